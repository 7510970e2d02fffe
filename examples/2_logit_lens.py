"""The logit lens as a table: the next token predicted from each hidden state, tokens by layers.

The logit lens is a Patchscope too: a state is written after the last block, so that only the final norm and
the unembedding follow.
"""

import patchscope_nn as ps

PROMPT = "The Eiffel Tower is in the city of"

scope = ps.Patchscope(
    source=ps.Source(
        prompt=PROMPT,
        position={"each": "all"},  # one cell for each token of the prompt
        layer=[0, 12, 18, 21, 24, 27, 29],  # and for each of these layers
    ),
    # Every state is written at the last token, whose logits are read. After the last block, tokens no longer
    # attend to each other, so the rest of the target prompt does not matter.
    target=ps.Target(prompt=PROMPT, position=-1, layer=-1),
    readout=ps.NextToken(top_k=1),
)
run = ps.run(scope, model="builtin:smollm2-135m-instruct")

table = run.table()  # a pandas DataFrame with a row for each (token, layer)
table["position"] = table["source_position"].str[0]
table["token"] = table["source_token"].str[0]
table["next"] = table["top_tokens"].str[0].map(repr)
print(table.pivot(index=["position", "token"], columns="source_layer", values="next").to_string())

# The last layer's column is the model's own prediction. How often do earlier layers agree with it?
final = table[table["source_layer"] == 29].set_index("position")["next"]
table["same"] = table["next"] == table["position"].map(final)
print("\nShare of tokens whose prediction is already the final one:")
print(table.groupby("source_layer")["same"].mean().round(2).to_string())
