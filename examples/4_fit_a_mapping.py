"""Does an affine map to the last layer read more out of layer 24 than the logit lens does?

The logit lens unembeds a state as it is, although earlier layers write in a basis of their own. Here a map
f(h) = A h + b from layer 24 to the last layer is fitted by ridge regression, on texts that come with the
package. Then both lenses read the same states, and their paired differences are printed.
"""

import tempfile
from pathlib import Path

import patchscope_nn as ps

model = ps.load("builtin:smollm2-135m-instruct")  # loaded once, used twice
file = Path(tempfile.mkdtemp()) / "map.safetensors"
fitted = ps.fit("affine", model=model, source_layers=[24], pairs="last", limit=50, max_tokens=64, out=file)
for (source, target), scores in fitted.about.held_out.items():
    print(f"layer {source} to {target}: cosine {scores['cosine']:.2f} on held-out texts\n")

recipe = ps.Recipe(
    name="two-lenses",
    data={"builtin": "contexts"},
    source=ps.Source(prompt="{context}", position=-1, layer=24),
    target=ps.Target(layer=-1),  # without a target prompt, the source prompt is used
    readout=ps.NextToken(reference="source"),
    metrics=["precision_at_1", "nll_nats"],
    controls=["shuffled"],  # another row's state: a lens that really reads the state does worse with it
    methods={"logit lens": {}, "affine map": {"mapping": {"fitted": str(file)}}},
)
comparison = ps.run(recipe, model=model, limit=40).compare()
means = comparison.means[["metric", "run", "control", "mean", "low", "high"]]
print(means.round(2).to_string(index=False))

differences = comparison.between().query("first_control == 'patched' and second_control == 'patched'")
print("\nPaired differences, second minus first:")
print(differences[["metric", "first", "second", "mean", "low", "high", "p"]].round(3).to_string(index=False))
