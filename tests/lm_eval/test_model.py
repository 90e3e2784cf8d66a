"""The model type `reqat`, and a stranger's `hf`, against our own evaluation on the pinned base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.data import encode_prompt
from reqat.evaluation import Outcomes, evaluate
from reqat.evaluation.loading import load_at
from reqat.lm_eval import TASKS
from reqat.lm_eval.model import ReqatLM
from reqat.models import freeze, load_model, load_tokenizer, prepare, save_model
from reqat.quant import Precision
from reqat.tasks import problems

BASE = str(Path(__file__).parents[2] / "results" / "base" / "model")
FP4 = "NVFP4-W4A4KV4"
LENGTH = 70
# Short chains: of the longer ones, responses of so many tokens do not reach the end.
OPTIONS = {"min_terms": 3, "max_terms": 6}


@pytest.fixture(scope="module")
def ours() -> Callable[..., Outcomes]:
    """What `reqat evaluate` finds."""

    def grade(precision: str, decoding: str, n: int, seeds: int = 1) -> Outcomes:
        return evaluate(
            load_at(BASE, precision),
            load_tokenizer(BASE),
            problems({"chain_sum": OPTIONS}, "test", n, 1),
            seeds=range(seeds),
            decoding=decoding,
            max_new_tokens=LENGTH,
        )

    return grade


def through_lm_eval(lm: Any, n: int, **settings: Any) -> tuple[list[str], list[float]]:
    """Responses by problem, then repeat, and avg@k of each problem."""
    out: Any = simple_evaluate(
        lm,
        tasks=["reqat_chain_sum"],
        limit=n,
        gen_kwargs={"max_gen_toks": LENGTH, **settings},
        task_manager=TaskManager(
            include_path=TASKS, include_defaults=False, metadata={"n_problems": 10, "chain_sum": OPTIONS}
        ),
        bootstrap_iters=0,
    )
    samples = sorted(out["samples"]["reqat_chain_sum"], key=lambda sample: sample["doc_id"])
    return [text for sample in samples for text in sample["resps"][0]], [sample["avg@k"] for sample in samples]


def accuracies(found: Outcomes, n: int) -> list[float]:
    return list(found.correct.reshape(n, -1).mean(axis=1))


def test_lm_eval_knows_the_model_type() -> None:
    assert get_model("reqat") is ReqatLM


def test_a_stranger_and_our_grader_agree_on_greedy_responses(ours: Callable[..., Outcomes]) -> None:
    """Other programs feed our models what `tokenizer(text)` gives, `<bos>` first."""
    found = ours("BF16", "greedy", 6)
    assert 0 < found.correct.mean() < 1, "a base that solves none or all would show nothing"
    stranger = HFLM(pretrained=BASE, dtype="float32", device="cpu", batch_size=48)
    responses, scores = through_lm_eval(stranger, 6, do_sample=False)
    assert responses[::8] == list(found.response or ()) and scores == accuracies(found, 6)


def test_a_folder_whose_tokenizer_adds_no_bos_is_read_as_our_evaluation_reads_it(tmp_path: Path) -> None:
    """Earlier versions saved such."""
    folder = shutil.copytree(BASE, tmp_path / "model")
    state = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**state, "post_processor": None}))
    assert load_tokenizer(folder)("3 + 4 =\n").input_ids[0] != 1
    assert ReqatLM(str(folder)).tok_encode("3 + 4 =\n") == encode_prompt(load_tokenizer(BASE), "3 + 4 =\n")


def test_sampled_responses_are_those_of_our_evaluation_at_every_seed(ours: Callable[..., Outcomes]) -> None:
    found = ours(FP4, "sample(temperature=0.6, top_p=0.95)", 3, seeds=8)
    lm = ReqatLM(BASE, FP4, batch_size=7)
    responses, scores = through_lm_eval(lm, 3)
    assert responses == list(found.response or ()) and scores == accuracies(found, 3)
    assert len(set(responses[:8])) > 1
    assert lm.get_model_info()["reqat_precision"] == FP4


def test_a_policy_replaces_the_tasks_own(ours: Callable[..., Outcomes]) -> None:
    policy = "reset(t_low=0.3, tau0=0.2)"
    found = ours("MXFP4-W4A16", policy, 2, seeds=8)
    lm = ReqatLM(BASE, "MXFP4-W4A16", decoding=policy, batch_size="auto")
    assert through_lm_eval(lm, 2)[0] == list(found.response or ())
    assert Decoding.parse(lm.get_model_info()["reqat_decoding"]) == Decoding.parse(policy)


@pytest.fixture(scope="module")
def lm() -> ReqatLM:
    return ReqatLM(BASE, FP4, kv_element="E1M2", batch_size=4)


def ask(text: str, **settings: Any) -> Instance:
    return Instance("generate_until", {"id": "p"}, (text, {"max_gen_toks": 40, "until": [], **settings}), 0)


def test_a_stop_text_ends_a_response(lm: ReqatLM) -> None:
    (whole,) = lm.generate_until([ask("3 + 4 + 5 =\n")], disable_tqdm=True)
    stop = whole[len(whole) // 2 :][:3]  # wherever that cuts tokens
    found = lm.generate_until([ask("3 + 4 + 5 =\n", until=stop), ask("3 + 4 + 5 =\n", until=[stop, "no such"])])
    assert found == [whole.split(stop)[0]] * 2 and whole.split(stop)[0] != whole


def test_likelihoods_do_not_depend_on_the_batch(lm: ReqatLM) -> None:
    pairs = [("3 + 4 =\n", "7"), ("12 + 30 + 5 =\n", "First, 12"), ("1 =\n", "The answer is 1."), ("2 =\n", "So")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (context, more), (value, _) in zip(pairs, found, strict=True):
        ids = torch.tensor([encode_prompt(lm.tokenizer, context + more)])
        start = len(encode_prompt(lm.tokenizer, context.rstrip()))
        with torch.no_grad():
            logs = lm.model(ids).logits.log_softmax(-1)
        expected = logs[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-4)


def test_a_chat_template_gives_the_ids_of_our_prompts(lm: ReqatLM) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for text in (template, template.removeprefix("{{ bos_token }}")):
        lm.tokenizer.chat_template = text
        try:
            context = lm.apply_chat_template([{"role": "user", "content": " 3 + 4 =\n"}])
            assert lm.tok_encode(context) == encode_prompt(lm.tokenizer, " 3 + 4 =\n")
        finally:
            lm.tokenizer.chat_template, lm._templated = None, False


def test_a_packed_model_answers(lm: ReqatLM) -> None:
    packed = ReqatLM(BASE, FP4, kv_element="E1M2", packed=True, batch_size=4)
    asked = [ask(f"{n} + 4 + 5 =\n") for n in range(1, 5)]
    found, expected = packed.generate_until(asked), lm.generate_until(asked)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 3  # sums in another order may tip a code
    requests = [Instance("loglikelihood", {}, ("3 + 4 =\n", "7"), 0)]
    assert packed.loglikelihood(requests)[0][0] == pytest.approx(lm.loglikelihood(requests)[0][0], abs=0.05)
    small = ReqatLM(BASE, FP4, kv_element="E1M2", packed=True, head="INT8", batch_size=4)
    assert small.get_model_info()["reqat_head"] == "INT8"
    own, rounded = (model.loglikelihood(requests)[0][0] for model in (packed, small))
    assert rounded != own and rounded == pytest.approx(own, rel=0.1)  # head and embeddings are rounded, and no more


def test_a_folder_is_run_at_the_precision_that_it_was_saved_with(tmp_path: Path) -> None:
    model = load_model(BASE)
    prepare(model, FP4, kv_element="E1M2")
    save_model(freeze(model), load_tokenizer(BASE), tmp_path / "model")
    found = ReqatLM(str(tmp_path / "model")).get_model_info()["reqat_precision"]
    assert found == f"{FP4}:kv_element=E1M2"
    assert ReqatLM(BASE).get_model_info()["reqat_precision"] == "BF16"


def test_a_released_checkpoint_is_run_at_what_its_configuration_says(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    for sidecar in (tmp_path / "model").glob("reqat.*"):
        sidecar.unlink()
    file = tmp_path / "model" / "config.json"
    given = {"cfg": "nvfp4", "kv_quant": True, "kv_cfg": "nvfp4_e1m2"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "fake_quant_config": given}))
    expected = Precision.parse(FP4, kv_element="E1M2", global_scale="dynamic")
    assert ReqatLM(str(tmp_path / "model")).get_model_info()["reqat_precision"] == str(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"precision": "NVFP4-W4A4KV5"}, "NVFP4-W4A4KV5"),
        ({"precison": FP4}, "'precison'.*'precision'"),
        ({"peft": "adapter"}, "'peft'"),
        ({"precision": FP4, "kv_element": "E3M0"}, "E3M0"),
        ({"packed": "yes"}, "packed='yes'"),
        ({"packed": True, "head": "NVFP5"}, "head.*'NVFP5'.*NVFP4"),
        ({"packed": True, "embeddings": "INT8-A8"}, "embeddings.*'INT8-A8'.*INT8"),
        ({"head": "INT8"}, "INT8.*packed=True"),
        ({"dtype": "float64"}, "'float64'"),
        ({"seed": -1}, "seed=-1"),
        ({"decoding": "sampel(temperature=1)"}, "sampel"),
        ({"reset": "no-such.json"}, "no-such.json.*fit-reset"),
        ({"decoding": "greedy", "reset": "fit.json"}, "give one"),
        ({"pretrained": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ReqatError, match=expected):
        ReqatLM(**{"pretrained": BASE, **arguments})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 5}, "top_k=5.*top_k=0"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"seed": 3}, "seed=3"),
        ({"max_gen_toks": 5000}, "1024 positions.*max_gen_toks=10"),
    ],
)
def test_a_setting_of_generation_that_would_be_ignored_is_refused(
    settings: dict[str, Any], expected: str, lm: ReqatLM
) -> None:
    with pytest.raises(ReqatError, match=expected):
        lm.generate_until([ask("1 + 2 =\n", **settings)])
