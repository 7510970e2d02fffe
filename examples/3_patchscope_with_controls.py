"""At which layer does a state hold the next token, and is the readout better than its controls?

The last state of each source prompt is written into the token-identity prompt "cat -> cat ... ?", which makes
the model repeat the token that the state encodes (Ghandeharioun et al. 2024, section 4.1). The score is
precision@1: how often the top token read from the state is the model's own next token after the source
prompt.
"""

import patchscope_nn as ps

scope = ps.Patchscope(
    source=ps.Source(prompt="{context}", position=-1, layer=[0, 12, 18, 21, 24, 27, 29]),
    target=ps.Target(prompt=ps.prompts.IDENTITY, position="?", layer="same"),
    readout=ps.NextToken(reference="source"),  # also run the source prompt, to compare with
)
run = ps.run(
    scope,
    model="builtin:smollm2-135m-instruct",
    data={"builtin": "contexts"},  # its column `context` fills {context}; a DataFrame works as well
    limit=25,
    metrics=["precision_at_1"],
    # unpatched: nothing is written. random: a random state of the same norm. shuffled: another row's state.
    controls=["unpatched", "random", "shuffled"],
)

summary = run.summary()  # a mean for each control and layer, with a 95 % bootstrap interval over data rows
patched = summary[summary["control"] == "patched"]
print(patched[["source_layer", "mean", "low", "high", "n_rows"]].round(2).to_string(index=False))
controls = summary[summary["control"] != "patched"]
print("\nThe highest mean of each control, over all layers:")
print(controls.groupby("control")["mean"].max().round(2).to_string())
