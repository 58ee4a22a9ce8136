"""Prompt sets, training data, completions and requests that are broken or hostile."""

import gzip
import json

from tests.hostile.cases import Case, Content, files, jsonl, study, written

DEEP = 100_000
PROMPT = {"id": "a", "prompt": "What is a zorp?"}
HEAD = "id,prompt\n"
# file name -> (content, phrase)
SETS: dict[str, tuple[str, Content, str]] = {
    "empty_csv": ("p.csv", "", "p.csv"),
    "header_only": ("p.csv", HEAD, "p.csv"),
    "one_field": ("p.csv", HEAD + "a\n", "p.csv:2"),
    "many_fields": ("p.csv", HEAD + "a,b,c,d\n", "p.csv:2"),
    "open_quote": ("p.csv", HEAD + 'a,"b\nc\n', "p.csv"),
    "nul_csv": ("p.csv", HEAD + "a,b\0c\n", "NUL"),
    "utf16_csv": ("p.csv", (HEAD + "a,b\n").encode("utf-16"), "UTF-16"),
    "latin1_csv": ("p.csv", HEAD.encode() + "a,é\n".encode("latin-1"), "p.csv:2"),
    "column_twice": ("p.csv", "prompt,prompt\na,b\n", "twice"),
    "no_prompt_column": ("p.csv", "a,b\n1,2\n", "p.csv"),
    "huge_cell": ("p.csv", HEAD + "a," + "x" * 200_000 + "\n", "p.csv"),
    "header_again": ("p.csv", HEAD + "a,b\n" + HEAD, "header again"),
    "spreadsheet_error": ("p.csv", HEAD + "a,#NAME?\n", "#NAME?"),
    "blank_prompt": ("p.csv", HEAD + "a,   \n", "p.csv"),
    "empty_jsonl": ("p.jsonl", "", "p.jsonl"),
    "blank_jsonl": ("p.jsonl", "\n\n\n", "p.jsonl"),
    "not_json": ("p.jsonl", "hello\n", "p.jsonl:1"),
    "half_json": ("p.jsonl", jsonl(PROMPT)[:-5], "p.jsonl:1"),
    "array_line": ("p.jsonl", "[1, 2]\n", "p.jsonl:1"),
    "number_line": ("p.jsonl", "7\n", "p.jsonl:1"),
    "null_line": ("p.jsonl", "null\n", "p.jsonl:1"),
    "two_on_a_line": ("p.jsonl", '{"prompt": "a"} {"prompt": "b"}\n', "p.jsonl:1"),
    "key_twice": ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "twice"),
    "nan": ("p.jsonl", '{"prompt": NaN}\n', "NaN"),
    "infinity": ("p.jsonl", '{"prompt": -Infinity}\n', "Infinity"),
    "surrogate": ("p.jsonl", '{"prompt": "\\ud800"}\n', "surrogate"),
    "nul_escape": ("p.jsonl", '{"prompt": "a\\u0000b"}\n', "NUL"),
    "deep_lists": ("p.jsonl", '{"prompt": ' + "[" * DEEP + "]" * DEEP + "}\n", "100"),
    "deep_objects": ("p.jsonl", '{"a": ' * DEEP + "1" + "}" * DEEP + "\n", "100"),
    "deep_unclosed": ("p.jsonl", "[" * DEEP + "\n", "p.jsonl"),
    "deep_json": ("p.json", "[" * DEEP + "]" * DEEP, "p.json"),
    "long_text": ("p.jsonl", json.dumps({"prompt": "x" * 10_000_001}) + "\n", "10000000"),
    "prompt_is_list": ("p.jsonl", '{"prompt": ["a"]}\n', "p.jsonl:1"),
    "prompt_is_object": ("p.jsonl", '{"prompt": {"a": 1}}\n', "p.jsonl:1"),
    "prompt_is_bool": ("p.jsonl", '{"prompt": true}\n', "p.jsonl:1"),
    "prompt_is_null": ("p.jsonl", '{"prompt": null}\n', "p.jsonl"),
    "prompt_empty": ("p.jsonl", '{"prompt": ""}\n', "p.jsonl"),
    "no_prompt": ("p.jsonl", '{"text": "a"}\n', "prompt"),
    "id_is_list": ("p.jsonl", '{"id": [1], "prompt": "a"}\n', "p.jsonl:1"),
    "json_object": ("p.json", '{"rows": 1}', "p.json"),
    "json_truncated_list": ("p.json", '[{"prompt": "a"},', "p.json"),
    "json_trailing": ("p.json", '[{"prompt": "a"}] x', "p.json"),
    "json_scalar": ("p.json", '"a"', "p.json"),
    "utf16_jsonl": ("p.jsonl", jsonl(PROMPT).encode("utf-16"), "UTF-16"),
    "utf32_jsonl": ("p.jsonl", jsonl(PROMPT).encode("utf-32"), "p.jsonl"),
    "html_jsonl": ("p.jsonl", "<!DOCTYPE html>\n<html></html>\n", "p.jsonl:1"),
    "lfs": ("p.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS"),
    "zip": ("p.csv", b"PK\x03\x04" + bytes(50), "zip"),
    "gzip_without_ending": ("p.jsonl", gzip.compress(b"{}"), "gzip"),
    "gzip_truncated": ("p.jsonl.gz", gzip.compress(jsonl(PROMPT).encode())[:-6], "gzip"),
    "gzip_garbage": ("p.jsonl.gz", b"\x1f\x8b" + bytes(30), "gzip"),
    "gzip_of_nothing": ("p.jsonl.gz", b"", "p.jsonl.gz"),
    "gzip_bomb": ("p.jsonl.gz", gzip.compress(bytes(80 << 20), 1), "expands"),
    "parquet_garbage": ("p.parquet", b"PAR1" + bytes(40) + b"PAR1", "p.parquet"),
    "parquet_empty": ("p.parquet", b"", "p.parquet"),
    "parquet_text": ("p.parquet", "hello", "p.parquet"),
    "no_ending": ("prompts", jsonl(PROMPT), "prompts"),
    "yaml_ending": ("p.yaml", "- a\n", "p.yaml"),
    "pickle": ("p.pkl", b"\x80\x04\x95", "p.pkl"),
    "arrow": ("p.arrow", b"ARROW1", "p.arrow"),
    "binary_csv": ("p.csv", bytes(range(256)), "p.csv"),
}
TRAINING: dict[str, tuple[str, Content, str]] = {
    "empty": ("t.jsonl", "", "t.jsonl"),
    "not_json": ("t.jsonl", "hello\n", "t.jsonl:1"),
    "no_known_format": ("t.jsonl", '{"a": "b"}\n', "t.jsonl"),
    "messages_text": ("t.jsonl", '{"messages": "a"}\n', "t.jsonl"),
    "messages_empty": ("t.jsonl", '{"messages": []}\n', "t.jsonl"),
    "message_without_role": ("t.jsonl", '{"messages": [{"content": "a"}]}\n', "t.jsonl"),
    "message_role_list": (
        "t.jsonl",
        '{"messages": [{"role": ["user"], "content": "a"}]}\n',
        "t.jsonl",
    ),
    "message_number": ("t.jsonl", '{"messages": [1, 2]}\n', "t.jsonl"),
    "alpaca_nan": ("t.json", '[{"instruction": "a", "input": NaN, "output": "b"}]', "NaN"),
    "sharegpt_odd": ("t.jsonl", '{"conversations": [{"from": 1, "value": 2}]}\n', "t.jsonl"),
    "csv_extra": ("t.csv", "prompt,completion\na,b,c\n", "t.csv:2"),
    "deep": ("t.jsonl", '{"messages": ' + "[" * DEEP + "]" * DEEP + "}\n", "100"),
    "utf16": ("t.jsonl", jsonl(PROMPT).encode("utf-16"), "UTF-16"),
    "surrogate": ("t.jsonl", '{"prompt": "\\udfff", "completion": "a"}\n', "surrogate"),
}
ROW = {
    **dict.fromkeys(("id", "category", "source", "label", "prompt", "answer"), "a"),
    "completion": "x",
    "tokens": 1,
    "ended": True,
}
COMPLETIONS: dict[str, tuple[Content, str]] = {
    "empty": ("", "completions"),
    "not_json": ("hello\n", "completions"),
    "half": (json.dumps(ROW)[:20], "completions"),
    "list": ("[]\n", "completions"),
    "other_fields": ('{"a": 1}\n', "completions"),
    "utf16": ((json.dumps(ROW) + "\n").encode("utf-16"), "completions"),
    "deep": ("[" * DEEP + "\n", "completions"),
    "number": ("9" * 5000 + "\n", "completions"),
    "null": ("null\n", "completions"),
    "text_is_number": (jsonl({**ROW, "completion": 7}), "completions"),
}
REQUESTS: dict[str, tuple[Content, str]] = {
    "empty": ("", "not a stage's request"),
    "not_json": ("hello", "not a stage's request"),
    "list": ("[]", "not a stage's request"),
    "object": ("{}", "not a stage's request"),
    "utf16": ("{}".encode("utf-16"), "not a stage's request"),
    "deep": ("[" * DEEP, "not a stage's request"),
    "digits": ("9" * 5000, "not a stage's request"),
    "unknown_kind": (
        json.dumps(
            {
                "kind": "os.system",
                "key": "a",
                "spec": {},
                "inputs": {},
                "out": "o",
                "log": "l",
                "scratch": "s",
            }
        ),
        "request",
    ),
    "null": ("null", "not a stage's request"),
}


def data_study(name: str) -> str:
    return study(data=f"{{pool: {{path: {{path: {name}}}}}, settings: {{size: 3}}}}")


CASES = [
    *(
        Case(f"prompts_{name}", f"prompts check {file}", phrase, written({file: content}))
        for name, (file, content, phrase) in SETS.items()
    ),
    *(
        Case(
            f"against_{name}",
            f"prompts check ok.jsonl --against {SETS[name][0]}",
            SETS[name][2],
            written({"ok.jsonl": jsonl(PROMPT), SETS[name][0]: SETS[name][1]}),
        )
        for name in ("not_json", "utf16_csv", "deep_lists", "gzip_bomb", "parquet_garbage", "nan")
    ),
    *(
        Case(
            f"{command}_data_{name}",
            f"{command} study.yaml{to}",
            phrase,
            written({"study.yaml": data_study(file), file: content}),
        )
        for command, to in (("validate", ""), ("pin", " --to out.yaml"))
        for name, (file, content, phrase) in TRAINING.items()
    ),
    *(
        Case(
            f"rescore_{name}",
            "rescore made --scorer keywords",
            phrase,
            written({"made/completions.sensitive.jsonl": content}),
        )
        for name, (content, phrase) in COMPLETIONS.items()
    ),
    *(
        Case(f"rerun_{name}", "rerun request.json", phrase, files(request__json=content))
        for name, (content, phrase) in REQUESTS.items()
    ),
    Case("prompts_missing", "prompts check none.csv", "none.csv", files()),
    Case("prompts_folder", "prompts check here", "here", files(here___a__txt="a")),
    Case("prompts_device", "prompts check /dev/zero", "/dev/zero", files()),
    Case("prompts_long_name", f"prompts check {'a' * 5000}.csv", "too long", files()),
    Case(
        "prompts_format",
        "prompts check p.jsonl --format magic",
        "magic",
        files(p__jsonl=jsonl(PROMPT)),
    ),
    Case(
        "prompts_similarity_nan",
        "prompts check p.jsonl --similarity nan",
        "similarity",
        files(p__jsonl=jsonl(PROMPT)),
    ),
    Case(
        "prompts_similarity_two",
        "prompts check p.jsonl --similarity 2",
        "similarity",
        files(p__jsonl=jsonl(PROMPT)),
    ),
    Case(
        "rescore_scorer",
        "rescore made --scorer magic",
        "magic",
        written({"made/completions.sensitive.jsonl": jsonl(ROW)}),
    ),
    Case("rescore_missing", "rescore none --scorer keywords", "none", files()),
    Case("rerun_missing", "rerun none.json", "none.json", files()),
    Case("rerun_folder", "rerun here", "here", files(here___a__txt="a")),
    Case("rerun_bucket", "rerun ftp://nowhere/a/b/c/d/e", "ftp", files()),
    Case("rerun_no_url", "rerun s3://x", "s3://x", files()),
]
