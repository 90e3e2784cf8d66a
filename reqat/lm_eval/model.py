"""Model type ``reqat`` of lm-eval: a model at a precision, through our own loading and generation.

Likelihoods are lm-eval's own arithmetic over the prepared model (:class:`HFLM`). Responses come from
:func:`reqat.generation.generate` instead of transformers' ``generate``: a response depends on its problem and its
sampling seed (0, 1, ... for the repeats of a task), not on the batch, and is the one that ``reqat evaluate`` grades;
every decoding policy is at hand. What a task asks for beyond temperature, top-p, length and stop texts is refused, not
ignored.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from reqat import __version__
from reqat.config.errors import ReqatError, unknown
from reqat.config.policy import Decoding
from reqat.config.precision import family
from reqat.config.vocabulary import check_embeddings, check_head
from reqat.data import with_bos
from reqat.evaluation.loading import load_at
from reqat.generation import generate
from reqat.generation.stops import StopTexts
from reqat.inference import pack
from reqat.models import load_tokenizer, precision_of
from reqat.models.limits import position_limit
from reqat.pipeline.resets import read_fit

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import LogitsProcessorList

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Arguments of HFLM that mean something for a model that is loaded already.
_OF_HFLM = ("max_length", "prefix_token_id", "logits_cache", "softmax_dtype", "think_end_token", "enable_thinking",
            "chat_template_args")  # fmt: skip
# Settings of transformers' generate that tasks write out, and the values at which they do nothing.
_OFF: Mapping[str, tuple[object, ...]] = {
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "repetition_penalty": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "use_cache": (None, True),
}


@register_model("reqat")
class ReqatLM(HFLM):
    """A model at a precision: ``--model reqat --model_args pretrained=FOLDER,precision=NVFP4-W4A4KV4``.

    Args:
        pretrained: a local folder with safetensors (ours, with its sidecar, or any), or ``package:NAME``.
        precision: a name such as ``NVFP4-W4A4KV4``; None for the one that the folder was saved with, else BF16.
        kv_element, global_scale, rotation: options of the precision; those of the folder, or the usual ones, if None.
        packed: run in four bits (:func:`reqat.pack`) instead of fake-quantized.
        head, embeddings: how a packed model stores these, as for :func:`reqat.pack`.
        decoding: a policy (``greedy``, ``sample(...)``, ``reset(...)``) in place of what the tasks ask for.
        reset: a file that ``reqat fit-reset`` wrote, in place of ``decoding``.
        seed: sampling seed of a problem's first response; its other ones follow.
        dtype: ``float32`` (what our evaluations compute in) or ``bfloat16``.
        device: the GPU if there is one, unless it says ``cpu``.
        batch_size: rows of a batch, or ``auto``: for responses what fits in memory, for likelihoods what lm-eval finds.
        max_batch_size: of ``auto``.
        more: arguments of HFLM that this model type takes: ``max_length``, ``prefix_token_id``, ``think_end_token`` ...

    Raises ReqatError for an unknown argument or value, and as loading, ``prepare`` and ``pack`` do.
    """

    def __init__(
        self,
        pretrained: str,
        precision: str | None = None,
        kv_element: str | None = None,
        global_scale: str | None = None,
        rotation: int | None = None,
        packed: bool = False,
        head: str | None = None,
        embeddings: str | None = None,
        decoding: str | None = None,
        reset: str | None = None,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **more: Any,
    ) -> None:
        for given in more:
            if given not in _OF_HFLM:
                raise unknown("argument of model type reqat", given, (*_OF_REQAT, *_OF_HFLM), where="--model_args")
        if type(packed) is not bool:
            raise ReqatError(f"--model_args packed={packed!r}: write True or False")
        if type(seed) is not int or seed < 0:
            raise ReqatError(f"--model_args seed={seed!r}: write a whole number, 0 or more")
        check_head(head, "--model_args head")
        check_embeddings(embeddings, "--model_args embeddings")
        if not packed and (head, embeddings) != (None, None):
            raise ReqatError(
                f"--model_args head={head},embeddings={embeddings}: of packed models; give packed=True, too"
            )
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES, where="--model_args")
        if decoding is not None and reset is not None:
            raise ReqatError(f"--model_args decoding={decoding} and reset={reset}: both set the policy; give one")
        if isinstance(more.get("think_end_token"), int):
            raise ReqatError(f"--model_args think_end_token={more['think_end_token']}: give the token's text")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ReqatError("model type reqat runs in one process: start it without accelerate launch or torchrun")
        text = read_fit(Path(reset)) if reset is not None else decoding
        self.decoding = None if text is None else Decoding.parse(text)
        self.seed, self.source = seed, str(pretrained)
        name = None if precision is None else str(precision)
        if name is not None:
            family(name)  # an unknown one ends here, in one line
        options: dict[str, Any] = {"kv_element": kv_element, "global_scale": global_scale, "rotation": rotation}
        model = load_at(
            self.source,
            name,
            dtype=DTYPES[dtype],
            gpu=device is None or not str(device).startswith("cpu"),
            **{option: value for option, value in options.items() if value is not None},
        )
        self.packed, self.head, self.embeddings = packed, head, embeddings
        if packed:
            pack(model, head=head, embeddings=embeddings)
        self._templated = False
        super().__init__(
            pretrained=model,
            tokenizer=with_bos(load_tokenizer(self.source)),
            batch_size=batch_size,
            max_batch_size=max_batch_size or 64,
            **more,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the tokenizer's chat template; the user's without white space around them, as
        :func:`reqat.data.encode_prompt` has them."""
        self._templated = True
        history = [m if m["role"] != "user" else {**m, "content": m["content"].strip()} for m in chat_history]
        return str(super().apply_chat_template(history, add_generation_prompt))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; of one in a chat template nothing but what that wrote, as transformers tokenizes it."""
        if self._templated and add_special_tokens is None:
            add_special_tokens = False
        return list(super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A response to each request: (context, settings of generation). The n-th one for the same problem is sampled
        with the n-th seed.

        Raises ReqatError for settings that the one generation path does not have, and for a prompt that leaves no room
        for a response.
        """
        if not self._templated and self.tokenizer.chat_template:
            warnings.warn(
                f"{self.source} has a chat template, which lm-eval uses with --apply_chat_template only", stacklevel=2
            )
        groups: dict[tuple[str | None, str], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[request.task_name, json.dumps(request.args[1], sort_keys=True)].append(i)
        responses = [""] * len(requests)
        for (task, _), rows in groups.items():
            texts = self._respond([requests[i] for i in rows], disable_tqdm, f"{task or 'generating'}")
            for i, text in zip(rows, texts, strict=True):
                responses[i] = text
                if self.decoding is None or self.decoding.is_greedy:
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return responses

    def _respond(self, requests: Sequence[Instance], quiet: bool, caption: str) -> list[str]:
        """Responses to requests of one task and of equal settings."""
        asked = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        decoding, stops = self.decoding or _decoding(asked), [text for text in asked["until"] if text]
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        keys = [_key(request) for request in requests]
        before: Counter[str] = Counter()
        seeds = []
        for key in keys:
            seeds.append(self.seed + before[key])
            before[key] += 1
        self._check_room(prompts, asked["max_gen_toks"])
        # Greedy responses to equal prompts are equal.
        first = {tuple(prompt): i for i, prompt in reversed(list(enumerate(prompts)))} if decoding.is_greedy else {}
        rows = sorted(first.values()) if decoding.is_greedy else list(range(len(prompts)))
        found = generate(
            self.model,
            self.tokenizer,
            [prompts[i] for i in rows],
            seeds=[seeds[i] for i in rows],
            row_keys=[keys[i] for i in rows],
            decoding=decoding,
            max_new_tokens=asked["max_gen_toks"],
            processors=self._stopping(stops),
            batch_rows=None if self.batch_size == "auto" else int(self.batch_size),
            progress=False if quiet else caption,
        )
        texts = self.tokenizer.batch_decode([list(one.token_ids) for one in found], skip_special_tokens=True)
        of_row = {
            i: postprocess_generated_text(text, stops, self.think_end_token)
            for i, text in zip(rows, texts, strict=True)
        }
        return [of_row[first[tuple(prompt)] if decoding.is_greedy else i] for i, prompt in enumerate(prompts)]

    def _stopping(self, stops: Sequence[str]) -> LogitsProcessorList | None:
        from transformers import LogitsProcessorList

        # A text that ends a response may also stand in the reasoning before it.
        if not stops or self.think_end_token is not None:
            return None
        return LogitsProcessorList([StopTexts(stops, self.tokenizer)])

    def _check_room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest, limit = max(map(len, prompts)), position_limit(self.model.config)
        if limit is not None and longest + max_new_tokens > limit:
            raise ReqatError(
                f"{self.source} reaches {limit} positions; the longest prompt takes {longest}, and responses of up to "
                f"{max_new_tokens} tokens are asked for: --gen_kwargs max_gen_toks={max(0, limit - longest)} at most"
            )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the scores: precision with its options, policy, version."""
        ours = {
            "reqat_source": self.source,
            "reqat_precision": str(precision_of(self.model)),
            "reqat_packed": self.packed,
            "reqat_head": self.head,
            "reqat_embeddings": self.embeddings,
            "reqat_decoding": None if self.decoding is None else str(self.decoding),
            "reqat_seed": self.seed,
            "reqat_version": __version__,
        }
        return {**super().get_model_info(), **ours}


_OF_REQAT = ("pretrained", "precision", "kv_element", "global_scale", "rotation", "packed", "head", "embeddings",
             "decoding", "reset", "seed", "dtype", "device", "batch_size", "max_batch_size")  # fmt: skip


def _key(request: Instance) -> str:
    """The name of a problem in the random numbers of its responses: its id (all that our tasks have), else its text."""
    doc = request.doc
    return str(doc["id"]) if isinstance(doc, Mapping) and doc.get("id") is not None else str(request.args[0])


def _decoding(asked: Mapping[str, Any]) -> Decoding:
    """The policy that a task's settings ask for. Raises ReqatError for a setting that changes it otherwise."""
    for name, value in asked.items():
        if name in ("until", "max_gen_toks", "do_sample", "temperature", "top_p"):
            continue
        if name not in _OFF or value not in _OFF[name]:
            raise ReqatError(
                f"{name}={value!r}: model type reqat knows do_sample, temperature, top_p, max_gen_toks and until. "
                f"Leave it out{f' (--gen_kwargs {name}={_OFF[name][1]})' if name in _OFF else ''}, or take --model hf"
            )
    temperature = asked.get("temperature")
    if not asked.get("do_sample") or temperature == 0:
        return Decoding.greedy()
    return Decoding.sample(
        1.0 if temperature is None else float(temperature), float(asked["top_p"]) if asked.get("top_p") else 1.0
    )
