"""Generators inside a vLLM engine of this process; written for vLLM 0.33, tested on a stand-in.

Prompts are sent as token ids of our own (`training.tokens`), so that every backend reads the same
text. Adapters of one base share its engine, which knows them by `LoRARequest`.

An engine takes a share of the GPU for itself (`SHARE`), for keys and values: other models leave
while it is there, and it leaves when they come back. What vLLM says depends on which requests it
happened to put together, by rounding, unless VLLM_BATCH_INVARIANT=1 is set: a resumed run then
writes the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from selfmoa.errors import MissingExtra, RecipeError
from selfmoa.generators.devices import Device, Weights
from selfmoa.generators.limits import refuse_long_texts
from selfmoa.generators.local import end_tokens
from selfmoa.generators.rows import prompt_rows, responses, text_rows
from selfmoa.training.policy import base_of, is_adapter, load_tokenizer, positions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from selfmoa.protocols import Draw, Sampling
    from selfmoa.records import Message, Response

SHARE = 0.9
"""Of the GPU's memory, what an engine takes."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of LoRA that an engine can be made for."""
HOTTEST = 2.0
"""The highest temperature that vLLM takes."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "nf4": "bfloat16"}


class Engine:
    """One vLLM engine: a base, and the adapters that were asked for so far."""

    def __init__(self, folder: Path, device: Device) -> None:
        from transformers import AutoConfig

        self.most = positions(AutoConfig.from_pretrained(folder))
        self._folder, self._held = folder, device.held
        self._adapters: dict[Path, Any] = {}
        self._rank = 0
        self.weights = Weights(device, self._start, self._count, str(folder))

    def add(self, folder: Path) -> Any:
        """Return what requests for an adapter carry; an engine made for less is made anew."""
        from peft import LoraConfig
        from vllm.lora.request import LoRARequest

        if folder not in self._adapters:
            rank = int(LoraConfig.from_pretrained(folder).r)
            number = len(self._adapters) + 1
            # Requests of one name are one to vLLM, and folders of all rounds are called "policy".
            self._adapters[folder] = LoRARequest(
                lora_name=f"adapter-{number}", lora_int_id=number, lora_path=str(folder)
            )
            if rank > self._rank:
                self._rank = _rank_for(rank)
                self.weights.drop()
        return self._adapters[folder]

    def ask(self, rows: Sequence[Sequence[int]], params: list[Any], adapter: Any) -> list[Any]:
        """Return what the engine says to each row of token ids, in their order."""
        found: list[Any] = self.weights.use().generate(
            [{"prompt_token_ids": list(row)} for row in rows],
            params,
            lora_request=adapter,
            use_tqdm=False,
        )
        return found

    def _start(self) -> Any:
        from vllm import LLM

        more: dict[str, Any] = {"max_lora_rank": self._rank} if self._rank else {}
        if self._held == "nf4":
            more["quantization"] = "bitsandbytes"
        return LLM(
            model=str(self._folder),
            dtype=DTYPES[self._held],
            seed=0,
            trust_remote_code=False,
            generation_config="vllm",  # not the vendor's penalties and temperatures
            gpu_memory_utilization=SHARE,
            enable_prefix_caching=True,
            enable_lora=bool(self._rank),
            **more,
        )

    def _count(self) -> int:
        _, total = torch.cuda.mem_get_info()
        return round(SHARE * total)


class VLLMGenerator:
    """Answers prompts with a vLLM engine; see `protocols.Generator`."""

    def __init__(self, engine: Engine, adapter: Path | None, tokenizer: Any, name: str) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, name
        self.stops = end_tokens(tokenizer)
        self._adapter = engine.add(adapter) if adapter else None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        threads: int,  # noqa: ARG003 - vLLM has threads of its own
        digest: str,
        device: Device | None = None,
    ) -> VLLMGenerator:
        """Take a policy folder; the engine starts when it is first asked.

        Raises:
            MissingExtra: vLLM is not installed.
        """
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise MissingExtra("generator", "vllm", "vllm", "selfmoa[vllm]") from error
        device = device or Device()
        base = base_of(folder).resolve()
        engine = device.shared.setdefault(("vllm", base), Engine(base, device))
        adapter = folder.resolve() if is_adapter(folder) else None
        return cls(engine, adapter, load_tokenizer(folder), device.label(digest))

    def generate(self, draws: Sequence[Draw], sampling: Sampling) -> list[Response]:
        """Answer one batch of draws; temperature 0 is greedy.

        Raises:
            PromptTooLong: a prompt and its answer do not fit the model; nothing was asked.
            RecipeError: vLLM takes no temperature as high.
        """
        from vllm import SamplingParams

        if not draws:
            return []
        if sampling.temperature > HOTTEST:
            raise RecipeError(
                "temperature", f"{sampling.temperature} is more than vLLM takes ({HOTTEST})"
            )
        rows = prompt_rows(self.tokenizer, draws, sampling, self.engine.most)
        params = [
            SamplingParams(
                n=1,
                temperature=sampling.temperature,
                seed=draw.seed,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self.stops,
                detokenize=False,
            )
            for draw in draws
        ]
        outputs = [found.outputs[0] for found in self.engine.ask(rows, params, self._adapter)]
        texts = self.tokenizer.batch_decode(
            [list(out.token_ids) for out in outputs], skip_special_tokens=True
        )
        said = [(t.strip(), out.finish_reason) for t, out in zip(texts, outputs, strict=True)]
        return responses(draws, sampling, self.model, said)

    def logprobs(
        self,
        items: Sequence[tuple[Sequence[Message], str]],
        template: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """Return log p(text | messages) of each item, without the end-of-turn token.

        The engine reads prompt and text, and says how likely each token of it was.

        Raises:
            BadInput: a prompt and its text do not fit the model; nothing was asked.
        """
        from vllm import SamplingParams

        if not items:
            return []
        rows = text_rows(self.tokenizer, items, template)
        whole = [(list(row.prompt), text) for row in rows for text in row.completions]
        ids = [prompt + text for prompt, text in whole]
        most = self.engine.most
        refuse_long_texts([len(row) for row in ids], most - 1 if most else None)
        # An engine writes a token at least; the log-probability of each that is read comes along.
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        found = self.engine.ask(ids, [params] * len(ids), self._adapter)
        return [
            sum(out.prompt_logprobs[len(prompt) + i][token].logprob for i, token in enumerate(text))
            for out, (prompt, text) in zip(found, whole, strict=True)
        ]


def _rank_for(rank: int) -> int:
    """Return the least rank that an engine can be made for and that holds this one."""
    return next((r for r in RANKS if r >= rank), rank)
