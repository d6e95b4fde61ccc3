"""A stand-in for vLLM 0.33 with the part of its surface that we use, on a transformers model.

Names, arguments and their limits are those of vllm/entrypoints/llm.py, sampling_params.py,
outputs.py, logprobs.py and lora/request.py; what is not there is refused as vLLM does. Greedy
answers and log-probabilities are real, so backends can be compared.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(kw_only=True)
class SamplingParams:
    """Limits as in `SamplingParams._verify_args`."""

    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not all(isinstance(i, int) for i in self.stop_token_ids or []):
            raise ValueError("stop_token_ids must contain only integers")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1
        assert self.lora_path


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class Log:
    """What was asked of all engines, for tests."""

    engines: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)


class LLM:
    log = Log()

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        trust_remote_code: bool = False,
        quantization: str | None = None,
        gpu_memory_utilization: float = 0.92,
        generation_config: str = "auto",
        enable_prefix_caching: bool | None = None,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
    ) -> None:
        assert dtype in ("auto", "float32", "float16", "bfloat16")
        assert generation_config == "vllm", "a vendor's penalties would be used"
        assert max_lora_rank in MAX_LORA_RANKS
        self.log.engines.append({k: v for k, v in locals().items() if k not in ("self", "model")})
        self.lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.most = self.lm.config.max_position_embeddings
        self.eos = AutoTokenizer.from_pretrained(model).eos_token_id
        self.rank = max_lora_rank if enable_lora else 0
        self.peft: Any = None

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: SamplingParams | list[SamplingParams],
        *,
        use_tqdm: bool = True,  # noqa: ARG002
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        assert len(sampling_params) == len(prompts)
        found = []
        for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            ids = prompt["prompt_token_ids"]
            self.log.prompts.append(ids)
            if not ids or len(ids) >= self.most:
                raise ValueError(f"The prompt (length {len(ids)}) is longer than {self.most}")
            with torch.no_grad(), self._adapted(lora_request) as lm:
                found.append(self._one(str(i), lm, ids, params))
        return found

    def _adapted(self, request: LoRARequest | None) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def adapted() -> Any:
            if request is None:
                if self.peft is None:
                    yield self.lm
                else:
                    with self.peft.disable_adapter():
                        yield self.peft
                return
            assert self.rank, "Call to add_lora with enable_lora=False"
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.lm, request.lora_path, request.lora_name)
            elif request.lora_name not in self.peft.peft_config:
                self.peft.load_adapter(request.lora_path, request.lora_name)
            assert self.peft.peft_config[request.lora_name].r <= self.rank
            self.peft.set_adapter(request.lora_name)
            yield self.peft

        return adapted()

    def _one(self, name: str, lm: Any, ids: list[int], params: SamplingParams) -> RequestOutput:
        scores = None
        if params.prompt_logprobs is not None:
            logps = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores = [None] + [
                {token: Logprob(float(logps[i, token]))} for i, token in enumerate(ids[1:])
            ]
        generator = torch.Generator()
        if params.seed is not None:
            generator.manual_seed(params.seed)
        stops = {*(params.stop_token_ids or []), self.eos}
        said: list[int] = []
        reason = "length"
        for _ in range(min(params.max_tokens or self.most, self.most - len(ids))):
            logits = lm(input_ids=torch.tensor([ids + said])).logits[0, -1]
            if params.temperature < 1e-5:
                token = int(logits.argmax())
            else:
                p = (logits / params.temperature).softmax(-1)
                noise = torch.empty_like(p).exponential_(generator=generator)
                token = int((p / noise).argmax())
            said.append(token)
            if token in stops:
                reason = "stop"
                break
        return RequestOutput(name, ids, scores, [CompletionOutput(0, "", said, reason)])


def install(monkeypatch: Any) -> Log:
    """Put the stand-in where `import vllm` finds it; return what it will note."""
    LLM.log = Log()
    names = {"vllm": [LLM, SamplingParams], "vllm.lora": [], "vllm.lora.request": [LoRARequest]}
    for name, things in names.items():
        module = ModuleType(name)
        for thing in things:
            setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, name, module)
    return LLM.log
