"""Loading and describing a model of the vLLM engine, in this process or served elsewhere.

nnsight builds the structure of vLLM's own implementation of a model, without weights, in this process. The
weights are loaded by the engine, in processes of its own, or by a server. vLLM is imported only here.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

from patchscope_nn.errors import ModelError
from patchscope_nn.models.architecture import sizes_of
from patchscope_nn.models.info import (
    ELSEWHERE,
    STATES_ARGUMENTS,
    VLLM,
    Architecture,
    Model,
    ModelInfo,
    Part,
)
from patchscope_nn.models.turns import in_turn
from patchscope_nn.spec.sites import ATTENTION, MLP

INSTALL = "pip install 'patchscope-nn[vllm]' (Linux, Python 3.11 to 3.13)"
#: The method of vLLM's `LLM` that runs requests; it draws progress bars for each trace.
_RUN = "generate"
#: The settings that traces need, and what another value would do.
_NEEDED: dict[str, tuple[Any, str]] = {
    "enable_chunked_prefill": (
        False,
        "splits prompts over several steps of vLLM, so that no trace sees a whole prompt.",
    ),
    "pipeline_parallel_size": (
        1,
        "gives each rank other blocks, and a trace sees those of one; use tensor_parallel_size.",
    ),
    "disable_log_stats": (False, "hides whether vLLM has computed a prompt again, without its patches."),
}


@in_turn
def load_vllm(
    name: str,
    source: str,
    *,
    weights: bool = True,
    mode: str = "sync",
    held_tokens: int | None = None,
    held_block: int = 1,
    dtype: Any = "auto",
    revision: str | None = None,
    **engine_args: Any,
) -> Model:
    """Load a model with the vLLM engine.

    Args:
        name: Its name in messages and manifests.
        source: Its id on the Hub, or its folder.
        weights: False builds only the structure, for a model that is served elsewhere.
        mode: nnsight's name for how the engine runs: `sync` here, `async` in a server.
        held_tokens: For a model that is served elsewhere, as in `ModelInfo`.
        held_block: The same.
        dtype: `auto`, or the name of a dtype.
        revision: The commit or branch of a Hub model.
        **engine_args: vLLM's engine arguments, for example `tensor_parallel_size` or `max_model_len`.

    Raises:
        ModelError: vLLM is not installed, cannot load the model, or would run it in a way that hides states.
    """
    for setting_name, (needed, effect) in _NEEDED.items():
        if engine_args.get(setting_name, needed) != needed:
            raise ModelError(
                f"{setting_name}={engine_args[setting_name]!r} {effect}", hint=f"Leave {setting_name} out."
            )
    engine = _engine_class()
    needs = {setting_name: needed for setting_name, (needed, _) in _NEEDED.items()}
    options = {**engine_args, **needs, "dtype": str(dtype).removeprefix("torch."), "revision": revision}
    options = {key: value for key, value in options.items() if value is not None}
    with _explained(name), _no_accelerator():
        traced = engine(source, dispatch=weights, mode=mode, **options)
    if weights and mode == "sync":
        llm = traced.vllm_entrypoint
        setattr(llm, _RUN, functools.partial(getattr(llm, _RUN), use_tqdm=False))
    model = _describe(name, source, traced, weights=weights, revision=revision, options=options)
    if weights:
        return model
    return replace(model, info=replace(model.info, held_tokens=held_tokens, held_block=held_block))


def preemptions(model: Model) -> int:
    """Return how often an engine has put a request off, to compute it again without its patches."""
    loggers = _engine_of(model.traced).logger_manager.stat_loggers
    counters = [getattr(logger, "counter_num_preempted_reqs", {}) for logger in loggers]
    samples = [
        sample
        for by_engine in counters
        for counter in by_engine.values()
        for metric in counter.collect()
        for sample in metric.samples
    ]
    return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))


def _engine_class() -> Any:
    try:
        from nnsight.modeling import vllm
    except ImportError as error:
        raise ModelError(f"vLLM is not installed ({error}).", hint=INSTALL) from error
    return vllm.VLLM


@contextmanager
def _no_accelerator() -> Iterator[None]:
    """While active, vLLM does not clear the cache of an accelerator that is not there."""
    import torch

    if torch.accelerator.is_available():
        yield
        return
    with mock.patch.object(torch.accelerator, "empty_cache"):
        yield


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """While active, convert errors of vLLM to a `ModelError` with a hint."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "Check the id and the engine arguments (--engine-args); vLLM's own log says more."
        if "memory" in str(error).lower():
            hint = "Give more devices (tensor_parallel_size), a smaller max_model_len, or another dtype."
        raise ModelError(f"vLLM could not load {name!r}: {reason}", hint=hint) from error


def _describe(
    name: str, source: str, traced: Any, *, weights: bool, revision: str | None, options: dict[str, Any]
) -> Model:
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    module = traced._module  # noqa: SLF001 (as in Model.module)
    whole = AutoConfig.from_pretrained(source, revision=revision)
    config = whole.get_text_config()
    module.config = whole
    with suppress(OSError):  # most models have one; it names the tokens that end a text
        module.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
    settings = _settings(traced, source, options)
    architecture = _architecture(module, config, name=name)
    block = module.get_submodule(architecture.blocks)[0]
    shapes = [tuple(weight.shape) for weight in block.parameters() if weight.ndim > 1]
    info = ModelInfo(
        name=name,
        revision=getattr(whole, "_commit_hash", None),
        family=whole.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        n_positions=settings.max_model_len - 1,  # a request decodes at least one token
        dtype=str(settings.dtype).removeprefix("torch."),
        device=("cuda" if torch.cuda.is_available() else "cpu") if weights else ELSEWHERE,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        architecture=architecture,
        sizes=sizes_of(config, shapes, unembed_weights=config.hidden_size * config.vocab_size),
        engine=VLLM,
        engine_args=json.dumps(options, default=str, sort_keys=True),
        **_held(traced),
    )
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    return Model(info=info, tokenizer=tokenizer, traced=traced)


def _held(traced: Any) -> dict[str, Any]:
    """Return `held_tokens` and `held_block` of an engine in this process."""
    if traced.vllm_entrypoint is None:
        return {}
    cache = _engine_of(traced).vllm_config.cache_config
    if cache.num_gpu_blocks is None:
        return {}
    # vLLM keeps one block empty.
    n_tokens = (cache.num_gpu_blocks - 1) * cache.block_size
    return {"held_tokens": int(n_tokens), "held_block": int(cache.block_size)}


def _engine_of(traced: Any) -> Any:
    """Return vLLM's engine, which its `LLM` wraps and a server uses directly."""
    return getattr(traced.vllm_entrypoint, "llm_engine", traced.vllm_entrypoint)


def _settings(traced: Any, source: str, options: dict[str, Any]) -> Any:
    """Return vLLM's own description of the model: its dtype and its longest prompt."""
    if traced.vllm_entrypoint is not None:
        return _engine_of(traced).vllm_config.model_config
    from vllm.engine.arg_utils import EngineArgs

    with mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)):
        return EngineArgs(model=source, **options).create_model_config()


def _architecture(module: Any, config: Any, *, name: str) -> Architecture:
    from torch.nn import ModuleList

    lists = {path: part for path, part in module.named_modules() if isinstance(part, ModuleList)}
    deep = [path for path, part in lists.items() if len(part) == config.num_hidden_layers]
    if not deep:
        raise ModelError(
            f"vLLM's {type(module).__name__} of {name!r} has no list of {config.num_hidden_layers} blocks.",
            hint="Use the engine transformers.",
        )
    blocks = min(deep, key=len)
    block = module.get_submodule(blocks)[0]
    arguments = tuple(inspect.signature(block.forward).parameters)
    if not set(arguments) & set(STATES_ARGUMENTS):
        raise ModelError(
            f"the blocks of {name!r} ({type(block).__name__}) take {', '.join(arguments)}, none of which is "
            "known to hold the states.",
            hint="Use the engine transformers.",
        )
    return Architecture(
        blocks=blocks,
        parts=tuple(_parts(block, config.hidden_size)),
        final_norm=None,
        unembed="lm_head",
        arguments=(),
        block_arguments=arguments,
        requests=True,
    )


def _parts(block: Any, d_model: int) -> Iterator[Part]:
    """Yield the modules inside a block whose outputs have a known width."""
    ends = (*ATTENTION.modules, *MLP.modules)
    for path, part in block.named_modules():
        gives, takes = getattr(part, "output_size", None), getattr(part, "input_size", None)
        if isinstance(gives, int) and isinstance(takes, int):
            yield Part(path, takes, gives)
        elif path in ends:
            yield Part(path, d_model, d_model)
