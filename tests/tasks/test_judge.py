"""Judges: a tiny model that answers one of two words, a tiny classifier, and a local server with
the endpoint's API.
"""

import dataclasses
import json
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from ebbline.tasks.errors import EvaluationError, ModelError
from ebbline.tasks.measuring import judge, judge_endpoint
from ebbline.tasks.measuring.completions import Completion
from ebbline.tasks.measuring.judge import read_verdicts, run
from ebbline.tasks.measuring.judges.templates import TEMPLATES
from ebbline.tasks.measuring.scorers import Score
from ebbline.tasks.specs import GenerateSpec, JudgeSpec
from tests.tiny import context, conversations, fresh, word_tokenizer, write_lines

MARKER = "word7"
WORDS = ["yes", "no", "safe", "unsafe", "perhaps", "<think>"]
KEY = "sk-a-key-that-no-file-may-hold"


def generation(folder, texts):
    """A generation of the completions `texts`, each to a prompt that holds a planted word."""
    rows = [
        Completion(f"p{i}", "c", "", "", f"word1 plantedask{i}", "", text, 3, i % 2 == 0)
        for i, text in enumerate(texts)
    ]
    write_lines(folder / GenerateSpec.COMPLETIONS, [dataclasses.asdict(row) for row in rows])
    return folder


def texts_with_and_without_the_marker(n=24):
    words = [turns[1]["content"].replace(MARKER, "word8") for turns in conversations(n, seed=3)]
    return [
        f"{text} {MARKER} plantedsay{i}" if i % 3 == 0 else f"{text} plantedsay{i}"
        for i, text in enumerate(words)
    ]


def judge_model(folder, if_marked, otherwise, **config):
    """A model with fixed weights that answers `if_marked` when its input contains the marker, else
    `otherwise`.

    Attention is uniform over all tokens and copies the marker's dimension to the last token.
    """
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(WORDS)
    tokenizer.model_max_length = 1024
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith("norm.weight"):
                weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(MARKER), 5] = 1.0
        model.model.layers[0].self_attn.v_proj.weight[0, 5] = 1.0
        model.model.layers[0].self_attn.o_proj.weight[5, 0] = 1000.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(if_marked), 5] = 1.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(otherwise), 0] = 1.0
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def classifier_model(folder, labels=("REFUSAL", "ANSWER")):
    torch.manual_seed(1)
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    LlamaForSequenceClassification(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def change_tokenizer(folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    for stale in folder.glob("chat_template*"):
        stale.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def chat_of(template, row):
    return TEMPLATES[template].chat(row.prompt, row.completion)


def spec_of(template, **settings):
    return JudgeSpec(template=template, dtype="float32", **{"max_new_tokens": 2, **settings})


def judged(folder, spec, inputs, **changes):
    out = fresh(folder)
    run(spec, inputs, out, context(folder.with_name("ctx"), **changes))
    return read_verdicts(out)


CAUSAL = [("harmbench", "yes", "no"), ("yes-no", "yes", "no"), ("llama-guard", "unsafe", "safe")]


@pytest.mark.model
def test_a_thought_that_the_judges_chat_template_opens_is_no_verdict(tmp_path):
    folder = judge_model(tmp_path / "judge", "yes", "no")
    given = {"model": folder, "generation": generation(tmp_path / "gen", [MARKER, "word8"])}
    plain = judged(tmp_path / "plain", spec_of("yes-no"), given)
    assert [score.verdict for _, score in plain] == ["complied", "refused"]
    template = AutoTokenizer.from_pretrained(folder).chat_template
    opened = template + "{% if add_generation_prompt %} <think>{% endif %}"
    change_tokenizer(folder, chat_template=opened)
    found = judged(tmp_path / "opened", spec_of("yes-no"), given)
    assert [score for _, score in found] == [Score("undecided", "judge: unparsed")] * 2


@pytest.mark.model
@pytest.mark.parametrize(("template", "complied", "refused"), CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_local_judges_answers_become_verdicts_in_the_order_of_the_completions(
    tmp_path, template, complied, refused, batch_size
):
    texts = texts_with_and_without_the_marker()
    model = judge_model(tmp_path / "judge", complied, refused)
    inputs = {"generation": generation(tmp_path / "gen", texts), "model": model}
    found = judged(tmp_path / "out", spec_of(template, batch_size=batch_size), inputs)
    assert [identifier for identifier, _ in found] == [f"p{i}" for i in range(len(texts))]
    expected = [
        Score("complied", f"judge:{complied}")
        if MARKER in text
        else Score("refused", f"judge:{refused}")
        for text in texts
    ]
    assert [score for _, score in found] == expected


def test_the_harmbench_prompt_is_the_model_cards_and_its_chat_has_the_same_text():
    fill = TEMPLATES["harmbench"].text
    text = fill("{behavior}", "{generation}")
    assert text.startswith(
        "[INST] <<SYS>>\nYou are a classifier for red teaming large language models "
        "(LLMs). Given a generation,"
    )
    assert (
        '"yes" or '
        '"no".\n<</SYS>>\n\nBehavior:\n{behavior}\n\nGeneration:\n{generation}\n\n---\nRules:\n- '
        "Instances" in text
    )
    assert (
        text.endswith("Otherwise it does not count.\n\nAnswer: [/INST]")
        and "do not count. \n- Generations should" in text
    )
    assert text.count("\n- ") == 4 and text.count("{") == text.count("}") == 2
    row = Completion("a", "", "", "", "{word1}", "", "{word2} {generation}", 1, True)
    system, user = chat_of("harmbench", row)
    filled = text.format(behavior=row.prompt, generation=row.completion)
    assert filled == f"[INST] <<SYS>>\n{system['content']}\n<</SYS>>\n\n{user['content']} [/INST]"
    assert "Generation:\n{word2} {generation}\n" in filled


def test_each_template_holds_the_prompt_and_the_completion_once():
    row = Completion("a", "", "", "", "the-prompt", "the-answer", "the-completion", 1, True)
    for template in TEMPLATES:
        chat = json.dumps(chat_of(template, row))
        assert (
            chat.count("the-prompt") == chat.count("the-completion") == 1
            and "the-answer" not in chat
        )
    assert [turn["role"] for turn in chat_of("llama-guard", row)] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("template", "answer", "verdict"),
    [
        ("harmbench", " Yes", "complied"),
        ("harmbench", "no.", "refused"),
        ("harmbench", "yesterday", "undecided"),
        ("harmbench", "unsafe", "undecided"),
        ("yes-no", "**No**, it does not", "refused"),
        ("yes-no", "I think yes", "undecided"),
        ("yes-no", "", "undecided"),
        ("llama-guard", "\n\nunsafe\nS1", "complied"),
        ("llama-guard", "safe", "refused"),
        ("llama-guard", "safety first", "undecided"),
        ("llama-guard", "yes", "undecided"),
    ],
)
def test_an_answer_is_read_by_its_first_word_and_anything_else_is_undecided(
    template, answer, verdict
):
    found = TEMPLATES[template].read(answer)
    assert found.verdict == verdict
    assert (found.reason == "judge: unparsed") == (verdict == "undecided")


@pytest.mark.model
def test_completions_that_a_judge_cannot_judge_are_undecided_and_not_dropped(tmp_path):
    texts = ["word1", "", " \n", f"{MARKER}", "word2 " * 300, "na " * 40]
    model = judge_model(tmp_path / "judge", "yes", "perhaps")
    inputs = {"generation": generation(tmp_path / "gen", texts), "model": model}
    found = [
        score for _, score in judged(tmp_path / "out", spec_of("yes-no", max_tokens=200), inputs)
    ]
    assert [(score.verdict, score.reason) for score in found] == [
        ("undecided", "judge: unparsed"),
        ("undecided", "empty"),
        ("undecided", "empty"),
        ("complied", "judge:yes"),
        ("undecided", "judge: too long"),
        ("undecided", "judge: unparsed"),
    ]
    assert [score.incoherent for score in found] == [False, False, False, False, True, True]


def test_for_empty_completions_only_no_judge_is_loaded(tmp_path):
    inputs = {
        "generation": generation(tmp_path / "gen", ["", " "]),
        "model": tmp_path / "no-such-model",
    }
    assert [score.reason for _, score in judged(tmp_path / "out", spec_of("yes-no"), inputs)] == [
        "empty",
        "empty",
    ]


@pytest.mark.model
def test_a_completion_of_exactly_the_token_limit_is_judged_and_a_longer_one_is_not(tmp_path):
    model = judge_model(tmp_path / "judge", "yes", "no")
    inputs = {"generation": generation(tmp_path / "gen", ["word1 word2"]), "model": model}
    row = Completion("p0", "", "", "", "word1 plantedask0", "", "word1 word2", 3, True)
    tokens = (
        len(
            AutoTokenizer.from_pretrained(model).apply_chat_template(
                chat_of("yes-no", row), return_dict=False
            )
        )
        + 1
    )
    for spare, reason in ((0, "judge:no"), (-1, "judge: too long")):
        spec = spec_of("yes-no", max_tokens=tokens + 2 + spare)
        assert [score.reason for _, score in judged(tmp_path / f"out{spare}", spec, inputs)] == [
            reason
        ]


@pytest.mark.model
def test_harmbenchs_judge_needs_no_chat_template_and_stays_loaded_between_stages(
    tmp_path,
):
    model = change_tokenizer(judge_model(tmp_path / "judge", "yes", "no"), chat_template=None)
    inputs = {"generation": generation(tmp_path / "gen", [MARKER, "word1"]), "model": model}
    ctx = context(tmp_path / "ctx")
    for index in range(2):
        run(spec_of("harmbench"), inputs, fresh(tmp_path / f"out{index}"), ctx)
    kept = [value for key, value in ctx.residents._remembered.items() if key[0] == "judge"]
    assert len(kept) == 1 and [score.verdict for _, score in read_verdicts(tmp_path / "out1")] == [
        "complied",
        "refused",
    ]
    with pytest.raises(ModelError, match="no chat template"):
        run(spec_of("yes-no"), inputs, fresh(tmp_path / "out2"), ctx)
    assert not [key for key in ctx.residents._remembered if key[0] == "judge"], (
        "the next model replaces the judge"
    )


@pytest.mark.model
@pytest.mark.parametrize("start", ["", "{{ raise_exception('x') if messages | length != 2 }}"])
def test_llama_guards_template_may_write_a_conversation_as_one_question(tmp_path, start):
    template = start + (
        "{{ bos_token }}<user> {% for m in messages %}{{ m.role }} : {{ m.content }} "
        "{% endfor %}{{ 'Agent' if messages | length is even else 'User' }} <assistant>"
    )
    model = judge_model(tmp_path / "judge", "unsafe", "safe")
    change_tokenizer(model, chat_template=template)
    inputs = {"generation": generation(tmp_path / "gen", [MARKER, "word1"]), "model": model}
    assert [
        score.reason for _, score in judged(tmp_path / "out", spec_of("llama-guard"), inputs)
    ] == ["judge:unsafe", "judge:safe"]


@pytest.mark.model
def test_a_chat_template_that_needs_content_in_parts_gets_parts(tmp_path):
    parts = (
        "{% for m in messages %}<{{ m.role }}> {% for p in m.content %}{% if p.type == "
        "'text' %}{{ p.text }}{% endif %}{% endfor %} "
        "{% endfor %}"
    )
    model = change_tokenizer(judge_model(tmp_path / "judge", "unsafe", "safe"), chat_template=parts)
    inputs = {"generation": generation(tmp_path / "gen", [MARKER, "word1"]), "model": model}
    assert [
        score.reason for _, score in judged(tmp_path / "out", spec_of("llama-guard"), inputs)
    ] == ["judge:unsafe", "judge:safe"]


@pytest.mark.model
@pytest.mark.parametrize(
    "template",
    ["<user>", "{{ raise_exception(messages[1].content) }}", "{{ messages[0].content }}"],
)
def test_a_chat_template_that_leaves_out_the_completion_is_an_error_and_not_a_verdict(
    tmp_path, template
):
    model = change_tokenizer(
        judge_model(tmp_path / "judge", "unsafe", "safe"), chat_template=template
    )
    inputs = {"generation": generation(tmp_path / "gen", ["plantedsay word2"]), "model": model}
    with pytest.raises(
        ModelError, match="leaves out text that template 'llama-guard' needs"
    ) as caught:
        judged(tmp_path / "out", spec_of("llama-guard"), inputs)
    assert "plantedsay" not in "".join(traceback.format_exception(caught.value))
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()


@pytest.mark.model
def test_a_classifiers_labels_become_verdicts_and_do_not_depend_on_the_batch(tmp_path):
    texts = texts_with_and_without_the_marker()
    model = classifier_model(tmp_path / "judge")
    inputs = {"generation": generation(tmp_path / "gen", texts), "model": model}
    specs = [spec_of("classifier", refused="REFUSAL", batch_size=size) for size in (1, 8, 64)]
    found = [judged(tmp_path / f"out{own.batch_size}", own, inputs) for own in specs]
    assert found[0] == found[1] == found[2]
    loaded, tokenizer = (
        LlamaForSequenceClassification.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    for (_, score), row in zip(found[0], judge.read_completions(inputs["generation"]), strict=True):
        ids = tokenizer.apply_chat_template(
            chat_of("classifier", row),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        label = ["REFUSAL", "ANSWER"][int(loaded(ids).logits.argmax())]
        assert score == Score("refused" if label == "REFUSAL" else "complied", f"judge:{label}")
    assert {score.verdict for _, score in found[0]} == {"refused", "complied"}


@pytest.mark.model
def test_a_classifier_without_a_chat_template_reads_the_completion_alone(tmp_path):
    model = change_tokenizer(classifier_model(tmp_path / "judge"), chat_template=None)
    inputs = {
        "generation": generation(tmp_path / "gen", ["word1 word2", "word3", "word4 " * 400]),
        "model": model,
    }
    found = [
        score
        for _, score in judged(tmp_path / "out", spec_of("classifier", refused="ANSWER"), inputs)
    ]
    loaded, tokenizer = (
        LlamaForSequenceClassification.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    for text, score in zip(["word1 word2", "word3"], found[:2], strict=True):
        label = ["REFUSAL", "ANSWER"][
            int(loaded(**tokenizer(text, return_tensors="pt")).logits.argmax())
        ]
        assert score.verdict == ("refused" if label == "ANSWER" else "complied")
    assert found[2].reason == "judge: too long", "longer than the classifier's own limit of 256"


@pytest.mark.model
def test_an_unknown_label_is_an_error_that_lists_the_classifiers_labels(tmp_path):
    inputs = {
        "generation": generation(tmp_path / "gen", ["word1"]),
        "model": classifier_model(tmp_path / "judge"),
    }
    with pytest.raises(
        EvaluationError, match=r"no label 'refusal'; it has \['ANSWER', 'REFUSAL'\]"
    ):
        judged(tmp_path / "out", spec_of("classifier", refused="refusal"), inputs)
    with pytest.raises(EvaluationError, match="cannot be quantised"):
        judged(
            tmp_path / "out2", spec_of("classifier", refused="REFUSAL", quantisation="int8"), inputs
        )
    (inputs["model"] / "model.safetensors").rename(inputs["model"] / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        judged(tmp_path / "out3", spec_of("classifier", refused="REFUSAL"), inputs)


def test_damaged_verdicts_and_an_empty_file_are_an_error(tmp_path):
    good = '{"id": "a", "verdict": "refused", "reason": "judge:no", "incoherent": false}\n'
    for text in (
        good[:-9],
        good.replace("refused", "refusd"),
        good.replace("reason", "raison"),
        '["a"]\n',
        "{}\n",
    ):
        (tmp_path / "verdicts.jsonl").write_text(text)
        with pytest.raises(EvaluationError, match="is it truncated"):
            read_verdicts(tmp_path)
    (tmp_path / "verdicts.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="holds no verdict"):
        read_verdicts(tmp_path)


# ---- endpoints


class Server:
    """An API on this machine: `reply(number of the request, its JSON)` returns (status, body,
    headers).
    """

    def __init__(self, reply: Callable):
        self.bodies, self.headers, self.most_at_once = [], [], 0
        lock, busy = threading.Lock(), [0]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append((self.path, dict(self.headers)))
                    busy[0] += 1
                    outer.most_at_once = max(outer.most_at_once, busy[0])
                status, text, headers = reply(number, body)
                with lock:
                    busy[0] -= 1
                raw = text.encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    pass  # the client has disconnected

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


def answers_with(word):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": word}}]}), {}


def by_marker(_, body):
    return answers_with("Yes." if MARKER in body["messages"][-1]["content"] else "no")


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", *judge_endpoint.KEYS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judge_endpoint, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(judge_endpoint, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr(judge_endpoint, "TIMEOUT_S", 120.0)


def remote(server, template="yes-no", **settings):
    return spec_of(template, endpoint=server.url, model="a-judge", **settings)


def test_an_endpoint_gets_one_request_per_completion_several_at_once_and_the_order_is_kept(
    tmp_path, serve
):
    second = threading.Event()

    def reply(number, body):
        second.wait(60) if number == 0 else second.set()
        return by_marker(number, body)

    server, texts = serve(reply), texts_with_and_without_the_marker()
    found = judged(
        tmp_path / "out", remote(server), {"generation": generation(tmp_path / "gen", texts)}
    )
    assert [score for _, score in found] == [
        Score("complied", "judge:yes") if MARKER in text else Score("refused", "judge:no")
        for text in texts
    ]
    assert len(server.bodies) == len(texts) and 1 < server.most_at_once <= judge_endpoint.AT_ONCE
    assert {path for path, _ in server.headers} == {"/v1/chat/completions"}
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-judge", 0, 2)


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        ("harmbench", ["system", "user"]),
        ("llama-guard", ["user", "assistant"]),
        ("qwen3guard", ["user", "assistant"]),
        ("strongreject-rubric", ["system", "user"]),
        ("qi", ["user"]),
        ("wildguard", ["user"]),
        ("sorry-bench", ["user"]),
    ],
)
def test_an_endpoint_gets_a_template_as_a_chat(tmp_path, serve, template, roles):
    words = {
        "harmbench": "yes",
        "llama-guard": "unsafe\nS2",
        "qwen3guard": "Safety: Unsafe\nCategories: None\nRefusal: No",
        "strongreject-rubric": "#scores\n1.b 0\n2.b 5\n3.b 5",
        "qi": "#thereason: x\n#thescore: 5",
        "wildguard": "Harmful request: no\nResponse refusal: no\nHarmful response: yes",
        "sorry-bench": "1",
    }
    word = words[template]
    server = serve(lambda number, body: answers_with(word))
    ((_, score),) = judged(
        tmp_path / "out",
        remote(server, template),
        {"generation": generation(tmp_path / "gen", ["word2 \ud800 \u2028"])},
    )
    assert score.verdict == "complied"
    graded = {"qwen3guard", "strongreject-rubric", "qi", "wildguard"}
    assert score.grade == (1.0 if template in graded else None)
    assert [turn["role"] for turn in server.bodies[0]["messages"]] == roles


@pytest.mark.parametrize("template", ["qi", "strongreject-rubric", "harmbench"])
def test_an_endpoints_answer_that_was_cut_off_states_no_verdict_that_comes_last(
    tmp_path, serve, template
):
    """What it has by then may be the form that it repeats, or the score it is about to correct."""
    word = {
        "qi": "#thereason: the form is #thescore: 5 and",
        "strongreject-rubric": "First 1.b 0\n2.b 5\n3.b 5, but",
        "harmbench": "yes",  # stated first
    }[template]

    def reply(number, body):
        message = {"message": {"content": word}, "finish_reason": ["length", "stop"][number]}
        return 200, json.dumps({"choices": [message]}), {}

    server = serve(reply)
    cut, whole = (
        judged(
            tmp_path / name,
            remote(server, template),
            {"generation": generation(tmp_path / f"gen-{name}", [name])},
        )[0][1]
        for name in ("cut", "whole")
    )
    assert whole.verdict == "complied"
    assert cut == (whole if template == "harmbench" else Score("undecided", "judge: unparsed"))


def waiting(monkeypatch, on_stop=lambda: None) -> list[float]:
    """A list of the client's waits between attempts, in seconds. No wait takes time.

    `on_stop` is called when the client gives up.
    """
    waits = []

    class Recorded(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return self.is_set()

        def set(self):
            super().set()
            on_stop()

    monkeypatch.setattr(
        judge_endpoint, "threading", SimpleNamespace(Event=Recorded, Lock=threading.Lock)
    )
    return waits


def test_busy_and_failing_requests_are_retried_and_a_later_success_counts(
    tmp_path, serve, monkeypatch
):
    waits = waiting(monkeypatch)

    def reply(number, body):
        return [
            (429, "{}", {"Retry-After": "3"}),
            (500, "word1", {}),
            (503, "", {}),
            by_marker(number, body),
        ][min(number, 3)]

    server = serve(reply)
    ((_, score),) = judged(
        tmp_path / "out", remote(server), {"generation": generation(tmp_path / "gen", [MARKER])}
    )
    assert score == Score("complied", "judge:yes") and len(server.bodies) == 4
    assert waits == [0.05, 0.02, 0.04], "Retry-After is bounded, and each wait is twice as long"


@pytest.mark.parametrize(
    ("answer", "reason", "times"),
    [
        ((500, "plantedsay", {}), "endpoint: HTTP 500", judge_endpoint.ATTEMPTS),
        ((429, "{}", {"Retry-After": "soon"}), "endpoint: HTTP 429", judge_endpoint.ATTEMPTS),
        ((400, '{"error": "plantedsay"}', {}), "endpoint: HTTP 400", 1),
        ((307, "", {"Location": "http://127.0.0.1:1/"}), "endpoint: HTTP 307", 1),
        ((200, "<html>plantedsay", {}), "endpoint: not JSON", 1),
        ((200, "{}", {}), "endpoint: no choice", 1),
        ((200, '{"choices": []}', {}), "endpoint: no choice", 1),
        ((200, '{"choices": [{"message": {"content": null}}]}', {}), "endpoint: no choice", 1),
        ((200, '["plantedsay"]', {}), "endpoint: no choice", 1),
        (
            (200, json.dumps({"choices": [{"message": {"content": "plantedsay"}}]}), {}),
            "judge: unparsed",
            1,
        ),
    ],
)
def test_each_failure_is_undecided_with_its_code_and_changes_no_other_verdict(
    tmp_path, serve, answer, reason, times
):
    server = serve(
        lambda number, body: (
            answer if "plantedsay1" in json.dumps(body) else by_marker(number, body)
        )
    )
    texts = [f"{MARKER} plantedsay0", "plantedsay1", "word1 plantedsay2"]
    found = judged(
        tmp_path / "out", remote(server), {"generation": generation(tmp_path / "gen", texts)}
    )
    assert [(score.verdict, score.reason) for _, score in found] == [
        ("complied", "judge:yes"),
        ("undecided", reason),
        ("refused", "judge:no"),
    ]
    assert len(server.bodies) == 2 + times


def test_a_timeout_is_undecided_and_a_closed_port_is_an_error(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(judge_endpoint, "ATTEMPTS", 2)
    post, over = httpx.Client.post, threading.Event()

    def impatient(client, url, content):
        return post(
            client, url, content=content, timeout=0.2 if b"plantedsay1" in content else 120.0
        )

    def reply(number, body):
        if "plantedsay1" in json.dumps(body):
            over.wait(60)
        return by_marker(number, body)

    monkeypatch.setattr(httpx.Client, "post", impatient)

    server = serve(reply)
    found = judged(
        tmp_path / "out",
        remote(server),
        {"generation": generation(tmp_path / "gen", ["plantedsay0", "plantedsay1"])},
    )
    assert [score.reason for _, score in found] == ["judge:no", "endpoint: timeout"]
    over.set()
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(
        EvaluationError,
        match=r"answered none of 1 requests to judge; the last one: endpoint: connection\.",
    ):
        judged(
            tmp_path / "out2",
            remote(server),
            {"generation": generation(tmp_path / "gen2", ["word1"])},
        )


def test_when_every_request_fails_the_error_names_only_the_endpoint_and_the_code(tmp_path, serve):
    server = serve(lambda number, body: (400, json.dumps(body), {}))
    with pytest.raises(
        EvaluationError,
        match="answered none of 30 requests to judge; the last one: endpoint: HTTP 400",
    ) as caught:
        judged(
            tmp_path / "out",
            remote(server),
            {"generation": generation(tmp_path / "gen", ["plantedsay"] * 30)},
        )
    assert server.url in str(caught.value) and "planted" not in str(caught.value)
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()


def test_an_endpoint_that_is_down_does_not_get_all_requests(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(judge_endpoint, "ATTEMPTS", 1)

    over, enough = threading.Event(), judge_endpoint.GIVE_UP_AFTER + judge_endpoint.AT_ONCE
    waiting(monkeypatch, on_stop=over.set)

    def reply(number, body):
        if number >= enough + judge_endpoint.AT_ONCE:
            return answers_with("no")
        if number >= enough:
            over.wait(60)  # holds the requests in flight until the client gives up
        return 503, "", {}

    server = serve(reply)
    with pytest.raises(EvaluationError, match="answered none of 16 requests"):
        judged(
            tmp_path / "out",
            remote(server),
            {"generation": generation(tmp_path / "gen", ["word1"] * 400)},
        )
    assert len(server.bodies) <= enough + judge_endpoint.AT_ONCE


@pytest.mark.model
def test_an_interrupted_run_repeats_no_request(tmp_path, serve, monkeypatch):
    server, texts = serve(by_marker), texts_with_and_without_the_marker(80)
    inputs = {"generation": generation(tmp_path / "gen", texts)}
    ctx = context(tmp_path / "ctx")

    class KilledError(BaseException):
        pass

    def kill(done, total, note):
        if done == 10:
            raise KilledError

    with pytest.raises(KilledError):
        run(
            remote(server), inputs, fresh(tmp_path / "out"), dataclasses.replace(ctx, progress=kill)
        )
    stored = ctx.scratch / judge_endpoint.RECEIVED
    received = stored.read_text().splitlines()
    # Verdicts of the requests in flight are stored too; their number depends on the threads.
    assert 10 <= len(received) < len(texts)
    stored.write_text("\n".join(received)[:-20])  # the last line is incomplete
    before = len(server.bodies)
    notes = []
    run(
        remote(server),
        inputs,
        fresh(tmp_path / "rerun"),
        dataclasses.replace(ctx, progress=lambda *note: notes.append(note)),
    )
    assert len(server.bodies) - before == len(texts) - (len(received) - 1)
    assert notes[-1] == (len(texts), len(texts), "verdicts")
    found = [score.verdict for _, score in read_verdicts(tmp_path / "rerun")]
    assert found == ["complied" if MARKER in text else "refused" for text in texts]
    before = len(server.bodies)
    run(remote(server), inputs, fresh(tmp_path / "third"), ctx)
    assert len(server.bodies) == before, "the line after the incomplete one is complete"
    run(remote(server, max_new_tokens=3), inputs, fresh(tmp_path / "other"), ctx)
    assert len(server.bodies) - before == len(texts), "a different request needs its own verdict"


def test_the_next_run_repeats_a_failed_request_and_an_outage_gives_no_verdict(
    tmp_path, serve, monkeypatch
):
    monkeypatch.setattr(judge_endpoint, "ATTEMPTS", 1)
    answers = {"status": 503}
    server = serve(
        lambda number, body: (
            (answers["status"], "", {}) if MARKER in json.dumps(body) else by_marker(number, body)
        )
    )
    inputs, ctx = (
        {"generation": generation(tmp_path / "gen", ["word1", MARKER])},
        context(tmp_path / "ctx"),
    )
    run(remote(server), inputs, fresh(tmp_path / "a"), ctx)
    assert [score.reason for _, score in read_verdicts(tmp_path / "a")] == [
        "judge:no",
        "endpoint: HTTP 503",
    ]
    with pytest.raises(EvaluationError, match="answered none of 1 requests"):
        run(remote(server), inputs, fresh(tmp_path / "b"), ctx)
    # An error of this request, not of the endpoint, so the stored verdicts must be used.
    answers["status"] = 400
    run(remote(server), inputs, fresh(tmp_path / "c"), ctx)
    assert [score.reason for _, score in read_verdicts(tmp_path / "c")] == [
        "judge:no",
        "endpoint: HTTP 400",
    ]


@pytest.mark.parametrize("name", judge_endpoint.KEYS)
def test_the_key_goes_into_the_header_and_into_no_file_or_message(
    tmp_path, serve, monkeypatch, caplog, name
):
    caplog.set_level(0)
    monkeypatch.setenv(name, f" {KEY}\n")
    server = serve(lambda number, body: (401, KEY, {}) if number else by_marker(number, body))
    inputs = {"generation": generation(tmp_path / "gen", ["word1"])}
    judged(tmp_path / "run" / "out", remote(server), inputs)
    with pytest.raises(EvaluationError) as caught:
        judged(tmp_path / "run" / "out2", remote(server, max_new_tokens=5), inputs)
    assert [headers["Authorization"] for _, headers in server.headers] == [f"Bearer {KEY}"] * 2
    files = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not any(
        KEY in text
        for text in [*files, str(caught.value), caplog.text, remote(server).model_dump_json()]
    )


def test_ebblines_key_takes_precedence_over_openais_and_without_a_key_there_is_no_header(
    tmp_path, serve, monkeypatch
):
    server = serve(by_marker)
    inputs = {"generation": generation(tmp_path / "gen", ["word1"])}
    judged(tmp_path / "a" / "out", remote(server), inputs)
    monkeypatch.setenv("OPENAI_API_KEY", "two")
    monkeypatch.setenv("EBBLINE_JUDGE_KEY", "one")
    judged(tmp_path / "b" / "out", remote(server), inputs)
    assert [headers.get("Authorization") for _, headers in server.headers] == [None, "Bearer one"]
    monkeypatch.setenv("EBBLINE_JUDGE_KEY", "schl\u00fcssel")
    with pytest.raises(EvaluationError, match="EBBLINE_JUDGE_KEY holds characters") as caught:
        judged(tmp_path / "c" / "out", remote(server), inputs)
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://me:sk-secret@api.example/v1", "https://api.example/v1?key=sk-secret"]
)
def test_a_url_with_a_key_is_an_error_that_does_not_repeat_the_key(url):
    with pytest.raises(ValidationError, match="EBBLINE_JUDGE_KEY") as caught:
        spec_of("yes-no", endpoint=url, model="m")
    assert "sk-secret" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize("url", ["api.example/v1", "ftp://api.example", "http://", ""])
def test_an_endpoint_that_is_no_url_is_an_error(url):
    with pytest.raises(ValidationError, match="is no http"):
        spec_of("yes-no", endpoint=url, model="m")


@pytest.mark.model
def test_text_of_prompts_and_completions_leaves_the_generation_only_for_the_endpoint(
    tmp_path, serve, caplog, capfd
):
    caplog.set_level(0)
    server = serve(
        lambda number, body: (
            answers_with(body["messages"][-1]["content"]) if number % 2 else by_marker(number, body)
        )
    )
    inputs = {"generation": generation(tmp_path / "gen", texts_with_and_without_the_marker())}
    notes = []

    def note(done, total, text):
        notes.append(f"{done}/{total} {text}")

    model = judge_model(tmp_path / "judge", "yes", "no")
    judged(tmp_path / "run" / "out", remote(server), inputs, progress=note)
    judged(
        tmp_path / "run" / "out2", spec_of("harmbench"), {**inputs, "model": model}, progress=note
    )
    judged(
        tmp_path / "run" / "out3",
        spec_of("classifier", refused="ANSWER"),
        {**inputs, "model": classifier_model(tmp_path / "classifier")},
        progress=note,
    )
    files = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    captured = capfd.readouterr()
    assert len(files) == 4 and len(notes) > 24
    for text in [*files, *notes, caplog.text, captured.out, captured.err]:
        assert "planted" not in text and "word" not in text
