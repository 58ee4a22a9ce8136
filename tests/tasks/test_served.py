"""Measuring at a server: what is asked of it, what of its answers is used, what is an error.

The server is a stand-in in this process. tests/tasks/test_vllm.py starts a real one.
"""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pydantic import ValidationError

from ebbline.cluster.profile import Profile
from ebbline.sweeps.study.suites import MultipleChoiceSuite, RefusalSuite, require_servers
from ebbline.tasks.errors import EndpointDown, EvaluationError, ModelError, StudyError
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.grouped.requests import group_name
from ebbline.tasks.measuring.served import guard, starting
from ebbline.tasks.measuring.served.client import Client, greedy
from ebbline.tasks.measuring.served.place import KEY, ServerPlace, given_at
from ebbline.tasks.measuring.served.server import server_for
from ebbline.tasks.measuring.served.stream import streamed
from ebbline.tasks.measuring.served.wanted import Wanted
from ebbline.tasks.specs import Decoding, EvaluateSpec, GenerateSpec
from ebbline.tasks.stage import Context

BACKEND = "lab==7"
MODEL = "m" * 64
NEW = 5


class Stand:
    """An OpenAI-compatible server. A completion of a prompt of n tokens is n % 3 + 1 times the word
    that belongs to the model's name.
    """

    def __init__(self, change=None, tokens=True, version="7", adapters=200, root=""):
        self.bodies, self.headers, self.paths = [], [], []
        self.change, self.tokens, self.adapters = change, tokens, adapters
        self.names = {"served": root}
        self.most_kinds, self._now, self._lock = 0, [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.paths.append(self.path)
                if self.path == "/version" and version:
                    return self._answer(200, {"version": version})
                if self.path == "/v1/models":
                    rows = [{"id": name, "root": root} for name, root in outer.names.items()]
                    return self._answer(200, {"data": rows})
                return self._answer(404, {"detail": "Not Found"})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.paths.append(self.path)
                outer.headers.append(dict(self.headers))
                if self.path == "/v1/load_lora_adapter":
                    if outer.adapters == 200:
                        outer.names[body["lora_name"]] = body["lora_path"]
                    reason = {} if outer.adapters in (200, 404) else {"message": "rank too large"}
                    return self._answer(outer.adapters, {"error": reason} if reason else {})
                if self.path != "/v1/completions":
                    return self._answer(404, {"detail": "Not Found"})
                kind = body["model"] == "served"
                with outer._lock:
                    outer.bodies.append(body)
                    outer._now.append(kind)
                    outer.most_kinds = max(outer.most_kinds, len(set(outer._now)))
                time.sleep(0.01)
                status, answer = outer.reply(body)
                with outer._lock:
                    outer._now.remove(kind)
                return self._answer(status, answer)

            def _answer(self, status, answer):
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, body):
        word = 7 if body["model"] == "served" else 8
        count = len(body["prompt"]) % 3 + 1
        choice = {
            "text": " ".join([f"word{word - 7}"] * count),
            "finish_reason": "stop" if count < 3 else "length",
        }
        if self.tokens:
            choice["token_ids"] = [word] * count
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        answer = {"model": body["model"], "choices": [choice], "usage": usage}
        return self.change(body, answer) if self.change else (200, answer)


@pytest.fixture
def stand():
    made = []

    def start(**settings):
        made.append(Stand(**settings))
        return made[-1]

    yield start
    for server in made:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


# Identity, and the place in the profile.


def test_a_served_backend_has_a_version_and_only_then_changes_a_key():
    with pytest.raises(ValidationError, match="a server with its version, such as vllm==0.32.0"):
        GenerateSpec(backend="vllm")
    assert "backend" not in EvaluateSpec(task="t").model_dump(mode="json")
    served = EvaluateSpec(task="t", backend=BACKEND).model_dump(mode="json")
    assert served["backend"] == BACKEND and EvaluateSpec(**served).backend == BACKEND
    keys = {digest(GenerateSpec(backend=name).model_dump()) for name in ("vllm==1", "vllm==2")}
    assert len(keys) == 2
    own = {"task": "t"}
    for spec in (GenerateSpec, EvaluateSpec):
        with pytest.raises(ValidationError, match="whole or as nf4; use the backend transformers"):
            spec(backend=BACKEND, quantisation="int8", **({} if spec is GenerateSpec else own))


@pytest.mark.parametrize(
    ("servers", "reason"),
    [
        ({BACKEND: {}}, "give `python`.* or `address`"),
        ({BACKEND: {"python": "p", "address": "http://h/v1"}}, "give `python`.* or `address`"),
        ({"vllm": {"address": "http://h/v1"}}, "no server with its version"),
        ({BACKEND: {"python": "/p"}}, "starts vLLM only; start lab==7 yourself"),
        ({BACKEND: {"address": "http://u:secret@h/v1"}}, f"at h holds .*variable {KEY}"),
        ({BACKEND: {"address": "http://h/v1?key=secret"}}, f"at h holds .*variable {KEY}"),
        ({BACKEND: {"address": "h:80"}}, "no http"),
        ({BACKEND: {"address": "http://h:x/v1"}}, "is no URL"),
        ({"vllm==1": {"python": "p", "models": {"0" * 12: "n"}}}, "at an `address`"),
    ],
)
def test_a_wrong_place_in_the_profile_is_an_error_that_says_what_to_write(servers, reason):
    with pytest.raises(ValidationError, match=reason) as caught:
        Profile(servers=servers)
    assert "secret" not in str(caught.value.errors(include_input=False))


def test_a_stage_gets_the_place_of_its_own_backend():
    profile = Profile(servers={"vllm==1": {"python": "/p"}})
    found = profile.server_of(GenerateSpec(backend="vllm==1"))
    assert found is not None and ServerPlace.model_validate(found).python == "/p"
    assert profile.server_of(GenerateSpec()) is None
    assert profile.server_of(GenerateSpec(backend="vllm==2")) is None


def test_a_study_whose_server_nothing_names_does_not_start():
    suites = {"refusal": RefusalSuite(), "mmlu": MultipleChoiceSuite(task="t", backend=BACKEND)}
    with pytest.raises(
        StudyError, match=r"suites\.mmlu\.measure\.backend is lab==7, .*vllm==1\. Add `servers"
    ):
        require_servers(suites, Profile(servers={"vllm==1": {"python": "p"}}))
    require_servers(suites, Profile(servers={BACKEND: {"address": "http://h/v1"}}))
    require_servers({"refusal": RefusalSuite()}, Profile())


def test_a_command_line_names_an_interpreter_or_an_address():
    assert given_at("/opt/vllm/bin/python").python == "/opt/vllm/bin/python"
    assert given_at("http://h:1/v1/").address == "http://h:1/v1"


# Starting vLLM.

WANTED = Wanted(
    "vllm==1", Path("/models/m"), "none", "float32", 16, 512, 20, 32, frozenset({"q_proj"})
)


def test_a_started_server_is_private_and_reads_nothing_of_the_models_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    place, ctx = ServerPlace(python="/opt/bin/python"), Context(tmp_path, tmp_path)
    words = starting.command(WANTED, place, "name", 5, ctx)
    environment = starting.environment(place, "the-key", "cpu")
    assert "the-key" not in " ".join(words) and environment["VLLM_API_KEY"] == "the-key"
    assert "PYTHONPATH" not in environment
    line = " ".join(words)
    for part in (
        "/opt/bin/python -m vllm",
        "--host 127.0.0.1 --port 5",
        "--served-model-name name",
        "--dtype float32",
        "--generation-config vllm",
        "--no-enable-prefix-caching",
        "--max-num-seqs 16",
        "--max-model-len 512",
        "--max-lora-rank 32 --lora-target-modules q_proj --max-loras 8",
        "--enforce-eager",
    ):
        assert part in line, part
    assert "trust" not in line and "--quantization" not in line


def test_on_gpus_it_holds_those_of_the_batch_and_no_row_changes_another(tmp_path):
    place = ServerPlace(python="p", gpu_share=0.5)
    ctx = Context(tmp_path, tmp_path, device="cuda", gpus=2)
    line = " ".join(starting.command(WANTED, place, "name", 5, ctx))
    assert "--tensor-parallel-size 2" in line and "--gpu-memory-utilization 0.5" in line
    assert "--enforce-eager" not in line
    assert starting.environment(place, "k", "cuda")["VLLM_BATCH_INVARIANT"] == "1"


def _ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


CHILD = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); {}; time.sleep(600)"
OWNER = """
import subprocess, sys, time
own = subprocess.Popen([sys.executable, "-I", sys.argv[1], sys.executable, "-c", sys.argv[2]],
                       stdin=subprocess.PIPE, start_new_session=True)
print(own.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("killed", "stubborn"), [("owner", False), ("owner", True), ("guard", False)]
)
def test_a_server_ends_with_its_owner(killed, stubborn, tmp_path):
    """Whichever is killed. With the owner, also what the command started, and a command that does
    not end when it is asked to; a guard that was killed can only ask.
    """
    own_guard = tmp_path / "guard.py"
    own_guard.write_text(Path(guard.__file__).read_text().replace("GRACE_S = 10", "GRACE_S = 0"))
    code = CHILD.format(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" if stubborn else "pass"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, own_guard, code], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    guarding, deadline = psutil.Process(int(owner.stdout.readline())), time.monotonic() + 30
    while len(guarding.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    below = [each.pid for each in guarding.children(recursive=True)]
    assert len(below) == 2
    (owner if killed == "owner" else guarding).kill()
    expected = below if killed == "owner" else below[:1]
    while not all(map(_ended, expected)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in below if not _ended(pid)]
    for pid in left:
        psutil.Process(pid).kill()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert not set(left) & set(expected)


# Requests and answers.


def test_every_setting_of_greedy_decoding_is_in_the_request(stand, monkeypatch):
    monkeypatch.setenv(KEY, "a-key")
    server = stand()
    client = Client(server.url)
    found = client.complete("served", [1, 9], greedy(Decoding(), NEW, [2, 11]))
    assert (found.tokens, found.count, found.ended) == ((7, 7, 7), 3, False)
    (body,) = server.bodies
    assert body["prompt"] == [1, 9] and body["stop_token_ids"] == [2, 11]
    for name, value in {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "max_tokens": NEW,
        "ignore_eos": False,
        "stop": None,
        "logit_bias": None,
    }.items():
        assert body[name] == value, name
    assert server.headers[0]["Authorization"] == "Bearer a-key"


def wrong(status, text):
    return lambda body, answer: (status, {"error": {"message": f"{text} {body['prompt']}"}})


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (wrong(500, "broken"), EndpointDown, "HTTP 500"),
        (wrong(401, "who"), EndpointDown, f"key in {KEY}"),
        (wrong(400, "too long"), EvaluationError, "rejects a request .*HTTP 400"),
        (lambda body, answer: (200, {"choices": []}), EvaluationError, "without a choice"),
        (
            lambda body, answer: (200, {**answer, "usage": {"prompt_tokens": 3}}),
            EvaluationError,
            "read a prompt of 2 tokens as 3",
        ),
        (
            lambda body, answer: (200, {**answer, "choices": [{"text": "x"}], "usage": None}),
            EvaluationError,
            "neither the tokens .* nor their number",
        ),
        (
            lambda body, answer: (200, {**answer, "model": "other"}),
            EvaluationError,
            "was asked for served and answers as other",
        ),
    ],
)
def test_no_failure_becomes_a_completion_or_quotes_a_prompt(stand, change, error, reason):
    client = Client(stand(change=change).url)
    with pytest.raises(error, match=reason) as caught:
        client.complete("served", [1, 93271], greedy(Decoding(), NEW, [2]))
    assert "93271" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_outage(stand):
    server = stand()
    server.http.server_close()
    with pytest.raises(EndpointDown, match="the same command continues"):
        Client(server.url).models()


def test_log_likelihoods_are_those_of_the_continuation_alone(stand):
    def change(body, answer):
        assert body["echo"] and body["logprobs"] == 1 and body["max_tokens"] == 1
        own = [None, -0.5, -1.0, -2.0, -9.0]
        best = [None, {"a": -0.5}, {"a": -0.25, "b": -1.0}, {"a": -2.0}, {"a": -9.0}]
        answer["choices"][0]["logprobs"] = {"token_logprobs": own, "top_logprobs": best}
        return 200, answer

    client = Client(stand(change=change).url)
    assert client.log_likelihood("served", [1, 2], [3, 4]) == (-3.0, False)
    assert client.log_likelihood("served", [1, 2, 3], [4]) == (-2.0, True)


def test_a_server_without_log_probabilities_is_an_error(stand):
    with pytest.raises(EvaluationError, match="no log-probabilities of a prompt"):
        Client(stand().url).log_likelihood("served", [1], [2])


def echoed(before=(), **changes):
    """An echo as of a server that puts tokens before a prompt, with some of its parts changed."""

    def change(body, answer):
        tokens = [*before, *body["prompt"]]
        values = [None, *(-float(token) for token in tokens[1:]), -0.5]
        best = [None, *({f"token_id:{n}": value} for n, value in enumerate(values[1:]))]
        names = [f"token_id:{token}" for token in (*tokens, 9)]
        found = {"token_logprobs": values, "top_logprobs": best, "tokens": names}
        for name, new in changes.items():
            if name in found:
                found[name] = new(found[name])
        answer["choices"][0]["logprobs"] = found
        answer["usage"]["prompt_tokens"] = len(tokens)
        if "answer" in changes:
            changes["answer"](answer)
        return 200, answer

    return change


NO_LOGPROBS = "no log-probabilities of a prompt"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (echoed(before=[1]), NO_LOGPROBS),
        (
            echoed(
                before=[1], token_logprobs=lambda own: own[:-1], top_logprobs=lambda own: own[:-1]
            ),
            "read a prompt of 5 tokens as 6",
        ),
        (echoed(tokens=lambda own: ["token_id:1", *own[:-1]]), "answers for other tokens"),
        (echoed(token_logprobs=lambda own: own[2:]), NO_LOGPROBS),
        (echoed(token_logprobs=lambda own: [*own[:-2], float("nan"), own[-1]]), NO_LOGPROBS),
        (echoed(top_logprobs=lambda own: None), NO_LOGPROBS),
        (echoed(top_logprobs=lambda own: [*own[:-2], None, own[-1]]), NO_LOGPROBS),
        (echoed(answer=lambda own: own.pop("usage")), "read a prompt of 5 tokens as None"),
        (echoed(answer=lambda own: own.update(model="base")), "answers as base"),
        (echoed(answer=lambda own: own.pop("model")), "answers as None"),
        (
            echoed(
                answer=lambda own: own["choices"][0].update(prompt_token_ids=[1, 10, 20, 30, 40])
            ),
            "answers for other tokens",
        ),
    ],
)
def test_an_echo_of_other_tokens_or_of_another_model_is_an_error(stand, change, reason):
    """A server that begins each prompt with a token of its own would shift every answer by one."""
    client = Client(stand(change=change).url)
    with pytest.raises(EvaluationError, match=reason):
        client.log_likelihood("served", [10, 20, 30], [40, 50])
    right = Client(stand(change=echoed()).url)
    assert right.log_likelihood("served", [10, 20, 30], [40, 50]) == (-90.0, True)


def test_a_stream_keeps_few_in_flight_and_what_may_not_meet_apart():
    now, most, lock, kinds = [], [0], threading.Lock(), []

    def request(item):
        def ask():
            with lock:
                now.append(item)
                most[0] = max(most[0], len(now))
                kinds.append({each // 10 for each in now})
            time.sleep(0.005)
            with lock:
                now.remove(item)
            return -item

        return None if item == 13 else ask

    items = [*range(9), *range(10, 19)]
    found = dict(
        streamed(items, request, 4, lambda: False, lambda one, other: one // 10 == other // 10)
    )
    assert found == {item: -item for item in items if item != 13}
    assert 1 < most[0] <= 4 and all(len(kind) == 1 for kind in kinds)


# Whole generations, with a model's tokenizer and adapters.


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, pair):
    from tests.tasks.test_grouped import tuned

    folder = tmp_path_factory.mktemp("served adapters")
    return [None, tuned(folder / "one", pair), tuned(folder / "two", pair, r=8)]


def measured(folder, pair, adapters, server, place=None, **spec):
    """Report and output of a generation for each adapter, run as one batch."""
    from ebbline.tasks.worker import run_stages
    from tests.tiny import conversations, request, write_lines

    texts = [turns[0]["content"] for turns in conversations(8, seed=5)]
    prompts = write_lines(
        folder / "set.jsonl", [{"id": str(n), "prompt": text} for n, text in enumerate(texts)]
    )
    place = {"address": server.url, "models": {MODEL[:12].replace("m", "0"): "served"}} | (
        place or {}
    )
    requests = []
    for number, adapter in enumerate(adapters):
        inputs = {"model": pair.aligned, "prompts": prompts}
        inputs |= {"adapter": adapter} if adapter else {}
        settings = {"backend": BACKEND, "dtype": "float32", "max_new_tokens": NEW, **spec}
        made = request(GenerateSpec(**settings), inputs, folder / str(number), server=place)
        contents = {**made.contents, "model": MODEL.replace("m", "0")}
        requests.append(type(made)(**{**vars(made), "contents": contents}))
    reports = {report.key: report for report in run_stages(requests)}
    return [(reports[each.key], Path(each.out)) for each in requests]


@pytest.mark.parametrize("tokens", [True, False])
def test_adapters_share_one_stream_and_get_their_own_completions(
    stand, tmp_path, pair, adapters, tokens
):
    server = stand(tokens=tokens)
    found = measured(tmp_path, pair, adapters, server)
    for number, (report, out) in enumerate(found):
        assert report.error is None and report.environment["grouped"] == 3
        rows = read_completions(out)
        assert len(rows) == 8
        for row, body in zip(rows, server.bodies, strict=False):
            words = row.completion.split()
            assert set(words) == {"word1" if number else "word0"} and len(words) == row.tokens
            assert row.ended == (row.tokens < 3) and body["stop_token_ids"]
        record = json.loads((out / GenerateSpec.DECODING).read_text())
        assert record["server"] == {"backend": BACKEND, "states_version": "7"}
    assert len(server.bodies) == 24 and len(server.names) == 3
    assert server.most_kinds == 1  # the model alone was never asked beside an adapter


@pytest.mark.parametrize(
    ("settings", "place", "reason"),
    [
        ({"version": "8"}, {}, "states the version 8; measure with `backend: lab==8`"),
        ({}, {"models": {}}, 'write `models: {"000000000000": NAME}` beside its address'),
        ({}, {"models": {"0" * 12: "other"}}, "it has no 'other'"),
    ],
)
def test_another_server_or_model_measures_nothing(stand, tmp_path, pair, settings, place, reason):
    server = stand(**settings)
    ((report, out),) = measured(tmp_path, pair, [None], server, place)
    assert reason in str(report.error) and not list(out.iterdir()) and not server.bodies


def test_a_server_that_read_the_models_own_folder_needs_no_name(stand, tmp_path, pair):
    server = stand(root=str(pair.aligned))
    ((report, _),) = measured(tmp_path, pair, [None], server, {"models": {}})
    assert report.error is None


def test_an_adapter_that_the_server_does_not_load_fails_alone(stand, tmp_path, pair, adapters):
    found = measured(tmp_path, pair, adapters, stand(adapters=400))
    assert found[0][0].error is None
    for report, _ in found[1:]:
        assert "does not load the adapter" in report.error and "rank too large" in report.error
    found = measured(tmp_path / "404", pair, adapters, stand(adapters=404))
    assert "loads no adapters at run time" in found[1][0].error


def test_an_outage_ends_a_group_and_asks_no_member_again(stand, tmp_path, pair, adapters):
    server = stand(change=wrong(503, "busy"))
    found = measured(tmp_path, pair, adapters, server)
    assert {report.error_type for report, _ in found} == {EndpointDown.__name__}
    assert len(server.bodies) <= 8  # the prompts of the first member


def test_without_a_place_the_error_names_the_file_to_write(tmp_path, pair, stand):
    from ebbline.tasks.worker import run_stages
    from tests.tiny import request, write_lines

    prompts = write_lines(tmp_path / "set.jsonl", [{"id": "1", "prompt": "word1"}])
    made = request(
        GenerateSpec(backend=BACKEND), {"model": pair.aligned, "prompts": prompts}, tmp_path / "x"
    )
    (report,) = run_stages([made])
    assert "lab==7 lies; name it in HOME/cluster.yaml under `servers`" in str(report.error)


def test_generations_of_one_server_form_a_group(tmp_path, pair):
    from tests.tiny import request

    def name(backend):
        spec = GenerateSpec(backend=backend)
        return group_name(request(spec, {"model": pair.aligned}, tmp_path / backend))

    assert name("lab==7") and len({name("lab==7"), name("lab==8"), name("transformers")}) == 3


def test_the_place_reaches_the_stage_from_the_profile_and_is_in_no_key(
    stand, tmp_path, pair, adapters
):
    from ebbline.cluster.executors.inline import InlineExecutor
    from ebbline.cluster.running.runner import Runner
    from ebbline.cluster.store.artifacts import Store
    from ebbline.tasks.identity import content_digest
    from ebbline.tasks.stage import Source, Stage
    from tests.tiny import write_lines

    prompts = write_lines(tmp_path / "set.jsonl", [{"id": "1", "prompt": "word1 word2"}])

    def source(path):
        return Source(content_digest(path), str(path))

    inputs = {"model": source(pair.aligned), "prompts": source(prompts)}
    stages = [
        Stage(
            GenerateSpec(backend=BACKEND, dtype="float32", max_new_tokens=NEW),
            inputs | ({"adapter": source(adapter)} if adapter else {}),
        )
        for adapter in adapters
    ]
    keys = []
    for place in ("first", "second"):  # an address each, in a store each
        server = stand()
        models = {inputs["model"].content: "served"}
        profile = Profile(servers={BACKEND: {"address": server.url, "models": models}})
        runner = Runner(Store(tmp_path / place), InlineExecutor(gpus=1), profile=profile)
        runner.add(stages)
        while not all(runner.settled(stage) for stage in stages):
            runner.step()
        assert len(server.bodies) == 3 and server.paths.count("/version") == 1  # one batch
        keys.append([runner.artifact(stage).key for stage in stages])
    assert keys[0] == keys[1] and len(set(keys[0])) == 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "no plain LoRA"),
        ({"init_lora_weights": "olora"}, "no plain LoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head"),
        ({"modules_to_save": ["lm_head"]}, "names of another|copies|beside"),
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern`, which only vLLM"),
        ({"alpha_pattern": {"q_proj": 2}}, "`alpha_pattern`, which only vLLM"),
    ],
)
def test_an_adapter_that_a_server_reads_otherwise_is_an_error(tmp_path, pair, settings, reason):
    from tests.tasks.test_grouped import tuned

    adapter = tuned(tmp_path / "adapter", pair, **settings)
    spec = GenerateSpec(backend="vllm==0.31.0")
    with pytest.raises(ModelError, match=reason):
        Wanted.by(spec, pair.aligned, 9, [adapter])


def test_what_a_server_needs_follows_from_its_adapters(tmp_path, pair, adapters):
    spec = GenerateSpec(backend="vllm==0.32.0", batch_size=16)
    wanted = Wanted.by(spec, pair.aligned, 9, adapters[1:])
    assert (wanted.rank, wanted.adapters, wanted.rows) == (8, 2, 16)
    assert wanted.tokens == 256  # the most that the model is made for
    assert {"q_proj", "down_proj"} < wanted.names


@pytest.fixture
def starts(stand, monkeypatch):
    """What each server was started for; the stand-in is the server."""
    found = []

    def start(wanted, place, ctx):
        found.append(wanted)
        process = SimpleNamespace(is_running=True, end=lambda: 0)
        return Client(stand(version="0.32.0").url), "served", process

    monkeypatch.setattr("ebbline.tasks.measuring.served.server.started", start)
    return found


@pytest.fixture(scope="module")
def unlike(tmp_path_factory, pair):
    """Adapters of different layers and ranks, and one that no server reads."""
    from tests.tasks.test_grouped import tuned

    here = tmp_path_factory.mktemp("unlike")
    return [
        tuned(here / "queries", pair, r=16, target_modules=["q_proj"]),
        tuned(here / "values", pair, r=8, target_modules=["v_proj", "down_proj"]),
        tuned(here / "dora", pair, use_dora=True),
    ]


def asked_for(pair, adapter):
    return Wanted.by(
        GenerateSpec(backend="vllm==0.32.0"), pair.aligned, 9, [adapter] if adapter else []
    )


def test_a_server_is_kept_only_for_layers_that_it_was_started_with(tmp_path, pair, starts, unlike):
    """vLLM drops the layers of an adapter that it was not started with, and says nothing."""
    from tests.tiny import context

    queries, values, _ = unlike
    ctx = context(tmp_path, server={"python": "/p"})
    for adapter in (queries, None, values, queries, values, None):
        server_for(asked_for(pair, adapter), ctx)
    assert [sorted(each.names) for each in starts] == [
        ["q_proj"],
        ["down_proj", "q_proj", "v_proj"],
    ]
    assert [each.rank for each in starts] == [16, 16]
    ctx.residents.clear()


def test_a_server_is_started_once_for_all_adapters_that_are_known(tmp_path, pair, starts, unlike):
    from tests.tiny import context

    ctx = context(tmp_path, server={"python": "/p"}, adapters=unlike)
    for adapter in (None, *unlike[1::-1]):
        server_for(asked_for(pair, adapter), ctx)
    (started,) = starts
    assert started.names == {"q_proj", "v_proj", "down_proj"} and started.rank == 16
    ctx.residents.clear()


def evaluated(*arguments):
    from typer.testing import CliRunner

    from ebbline.cli import app

    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_measures_at_an_address_and_reports_each_completion_that_differs(
    stand, tmp_path, pair, adapters
):
    from tests.tiny import conversations, write_lines

    server = stand(root=str(pair.aligned))
    rows = [
        {"id": f"p{n}", "prompt": turns[0]["content"]} for n, turns in enumerate(conversations(4))
    ]
    prompts = write_lines(tmp_path / "set.jsonl", rows)
    arguments = [
        *("--model", pair.aligned, "--suite", "refusal", "--prompts", prompts),
        *("--adapter", adapters[1], "--adapter", adapters[2], "--dtype", "float32"),
        *("--max-new-tokens", NEW, "--out", tmp_path / "out", "--backend", BACKEND),
        *("--server", server.url, "--check-backend"),
    ]
    done = evaluated(*arguments)
    assert done.exit_code == 0, done.output
    assert "4 of its completions differ from those of transformers" in done.output
    for name in ("model", "one", "two"):
        found = (tmp_path / "out" / name / "differences.csv").read_text().splitlines()
        assert [line.partition(",")[0] for line in found] == ["id", "p0", "p1", "p2", "p3"]
        assert "word" not in "".join(found)
    asked = len(server.bodies)
    assert asked == 12 and evaluated(*arguments).exit_code == 0 and len(server.bodies) == asked


def test_the_command_starts_one_server_for_all_its_adapters(tmp_path, pair, starts, unlike):
    from tests.tiny import write_lines

    prompts = write_lines(tmp_path / "set.jsonl", [{"id": "1", "prompt": "word1"}])
    arguments = [
        *("--model", pair.aligned, "--suite", "refusal", "--prompts", prompts),
        *("--adapter", unlike[1], "--adapter", unlike[0], "--dtype", "float32"),
        *("--max-new-tokens", NEW, "--out", tmp_path / "out", "--backend", "vllm==0.32.0"),
        *("--server", sys.executable),
    ]
    done = evaluated(*arguments)
    assert done.exit_code == 0, done.output
    (started,) = starts
    assert started.names == {"q_proj", "v_proj", "down_proj"} and started.rank == 16


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--backend", "lab==7"], "give both"),
        (["--server", "http://h/v1"], "give both"),
        (["--backend", "lab==7", "--server", "/bin/python"], "starts vLLM only"),
        (["--backend", "lab==7", "--server", "http://u:secret@h/v1"], "user name, a key"),
        (["--check-backend"], "needs --backend"),
    ],
)
def test_a_command_that_names_half_a_server_is_an_error(tmp_path, pair, given, reason):
    from tests.tiny import write_lines

    prompts = write_lines(tmp_path / "set.jsonl", [{"id": "1", "prompt": "word1"}])
    suite = ["--model", pair.aligned, "--suite", "refusal", "--prompts", prompts]
    done = evaluated(*suite, "--out", tmp_path / "out", *given)
    assert done.exit_code == 1 and reason in done.output and "secret" not in done.output


@pytest.mark.process
def test_doctor_finds_each_server_and_its_version(stand, tmp_path):
    from ebbline.commands.doctor import _server

    found = {
        name: _server(backend, place)[0]
        for name, backend, place in (
            ("there", BACKEND, ServerPlace(address=stand().url)),
            ("other", "lab==8", ServerPlace(address=stand().url)),
            ("silent", BACKEND, ServerPlace(address=stand(version=None).url)),
            ("none", "vllm==1", ServerPlace(python=sys.executable)),
            ("absent", "vllm==1", ServerPlace(python=str(tmp_path / "python"))),
        )
    }
    verdicts = {name: finding.verdict for name, finding in found.items()}
    assert verdicts == {
        "there": "ok",
        "other": "problem",
        "silent": "ok",
        "none": "problem",
        "absent": "problem",
    }
    assert "lab==7 in HOME/cluster.yaml" in found["other"].remedy
    assert (
        "no vLLM is installed there" in found["none"].seen
        and "states no version" in found["silent"].seen
    )
