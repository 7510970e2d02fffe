"""What does a model hold in the last token of "The Beatles", layer by layer?

`ps.explain` takes the hidden state of one token at each layer, writes it over the placeholder `x` of a prompt
that holds a few descriptions, and lets the model complete it (Ghandeharioun et al. 2024, section 4.3).
"""

import patchscope_nn as ps

look = ps.explain(
    "The Beatles",
    model="builtin:smollm2-135m-instruct",  # or a Hugging Face id, or a folder
    layer=[0, 2, 4, 9, 12, 15],  # layer l is the output of block l; the default is every layer
    max_new_tokens=10,
)
print(f"{look.model}, token {look.token[0]!r} of {look.prompt!r}\n")
print("layer      the model says it is")
for entry in look.says:
    # The first entry is the control: the same prompt without a patch. What the control says does not come
    # from the state.
    layer = "unpatched" if entry.layer is None else entry.layer
    print(f"{layer!s:<10} {entry.text.strip(' :')}")
