"""Lenses in the files that other packages write."""

import json

import torch

SIZE = 32


def numbers(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_tuned_lens(folder, *, bias=True, count=4, **changed):
    """As `TunedLens.save` of tuned-lens 0.2.0 does it: the state dict of a list of linear translators."""
    translators = torch.nn.ModuleList(torch.nn.Linear(SIZE, SIZE, bias=bias) for _ in range(count))
    for number, weight in enumerate(translators.parameters()):
        weight.data = numbers(*weight.shape, seed=number)
    torch.save(translators.state_dict() | changed, folder / "params.pt")
    config = {
        "base_model_name_or_path": "tiny",
        "d_model": SIZE,
        "num_hidden_layers": 4,
        "bias": bias,
        "base_model_revision": None,
        "unembed_hash": "0",
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return translators


def write_jacobian_lens(file, **changed):
    """As `JacobianLens.save` of jlens does it."""
    jacobians = {layer: numbers(SIZE, SIZE, seed=layer).half() for layer in (0, 2)}
    torch.save({"J": jacobians, "n_prompts": 10, "source_layers": [0, 2], "d_model": SIZE} | changed, file)
    return jacobians
