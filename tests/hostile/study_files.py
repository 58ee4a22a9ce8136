"""Study files that are broken or hostile."""

from tests.hostile.cases import STUDY, Case, Content, Make, files, study

DEEP = 100_000
ORGANISM = "{aligned: {organism: {size: small}}}"


def judge(endpoint: str) -> str:
    return f"{{j: {{settings: {{template: yes-no, endpoint: {endpoint!r}, model: m}}}}}}"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGES = "b0: &b0 {x: 1}\n" + "".join(
    f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
# name -> (text, phrase)
TEXTS: dict[str, tuple[Content, str]] = {
    "empty": ("", "must be a mapping"),
    "blank": ("\n\n \n", "must be a mapping"),
    "comment_only": ("# a study\n", "must be a mapping"),
    "list": ("- a\n- b\n", "must be a mapping"),
    "scalar": ("quickstart\n", "must be a mapping"),
    "utf16": (STUDY.encode("utf-16"), "UTF-8"),
    "utf16_le_no_mark": (STUDY.encode("utf-16-le"), "study.yaml"),
    "utf32": (STUDY.encode("utf-32"), "UTF-8"),
    "latin1": (STUDY.replace("Does", "Dé").encode("latin-1"), "study.yaml:2"),
    "nul": (STUDY + "x: \0\n", "study.yaml"),
    "bell": (STUDY + "x: \a\n", "study.yaml"),
    "escape": (STUDY + "x: \x1b[31m\n", "study.yaml"),
    "tab_indent": ("study: mine\nmodels:\n\t7b: {}\n", "line 3"),
    "unclosed_brace": ("study: {a: 1\n", "line"),
    "unclosed_quote": ('study: "mine\n', "line"),
    "half": (STUDY[: len(STUDY) // 2], "study.yaml"),
    "duplicate_key": (STUDY + "study: other\n", "duplicate key"),
    "two_documents": (STUDY + "---\n" + STUDY, "document"),
    "python_object": ("study: !!python/object/apply:os.system ['touch marker']\n", "study.yaml"),
    "python_name": ("study: !!python/name:os.system\n", "study.yaml"),
    "function_tag": (STUDY + "x: !function utils.f\n", "study.yaml"),
    "include_tag": (STUDY + "x: !include /etc/hostname\n", "study.yaml"),
    "binary_tag": (study(study="!!binary aGVsbG8="), "study"),
    "set_tag": (study(objectives="!!set {a, b}"), "objectives"),
    "set_tag_on_text": ("study: !!set a\n", "no mapping"),
    "omap_tag": (study(models="!!omap [a: 1]"), "models"),
    "octal": (
        STUDY.replace("train.rank: [8]", "train.rank: [010]"),
        "line 17: YAML does not read 010",
    ),
    "base_60": (STUDY.replace("steps: 200", "steps: 1:30"), "line 15: YAML does not read 1:30"),
    "base_60_float": (STUDY.replace("5e-3", "1:30.5"), "line 15: YAML does not read 1:30.5"),
    "merge_key": (
        STUDY.replace("train: {", "train: {<<: {steps: 100}, "),
        "line 15: merge keys (<<) are not read",
    ),
    "undefined_alias": (STUDY + "x: *nothing\n", "line"),
    "recursive_alias": ("study: &a [*a]\n", "study.yaml"),
    "recursive_mapping": ("models: &m {7b: *m}\n", "study.yaml"),
    "alias_bomb": (BOMB, "alias"),
    "merge_bomb": (MERGES, "alias"),
    "nested_lists": ("study: " + "[" * DEEP + "]" * DEEP, "nested"),
    "nested_mappings": ("study: " + "{a: " * DEEP + "1" + "}" * DEEP, "nested"),
    "nested_unclosed": ("study: " + "[" * DEEP, "study.yaml"),
    "nested_blocks": ("".join(" " * n + "a:\n" for n in range(300)), "nested"),
    "nested_dashes": ("- " * 5000 + "a\n", "nested"),
    "many_digits": (
        study(data=f"{{pool: {{language: a}}, settings: {{size: {'9' * 5000}}}}}"),
        "digits",
    ),
    "many_hex_digits": (study(study="0x" + "f" * 5000), "study"),
    "many_digits_key": ("1" * 900 + ": a\n", "digits"),
    "sexagesimal": (study(refusal_floor="1:30:" + "59:" * 2000 + "1"), "digits"),
    "bad_date": (study(study="2024-99-99"), "study.yaml"),
    "infinity": (study(refusal_floor=".inf"), "refusal_floor"),
    "nan": (study(refusal_floor=".nan"), "refusal_floor"),
    "floor_above_one": (study(refusal_floor="1.5"), "refusal_floor"),
    "floor_negative": (study(refusal_floor="-0.1"), "refusal_floor"),
    "floor_text": (study(refusal_floor="high"), "refusal_floor"),
    "huge_exponent": (study(refusal_floor="1e999999"), "refusal_floor"),
    "null_key": (STUDY + "null: 1\n", "study.yaml"),
    "list_key": (STUDY + "? [a, b]\n: 1\n", "study.yaml"),
    "mapping_key": (STUDY + "? {a: b}\n: 1\n", "study.yaml"),
    "number_key": (STUDY + "7: 1\n", "7"),
    "bool_key": (STUDY + "on: 1\n", "study.yaml"),
    "unknown_key": (STUDY + "serch: {}\n", "did you mean 'search'"),
    "long_line": (STUDY + "x: " + "a" * 200_000 + "\n", "study.yaml"),
    "long_unknown_key": (STUDY + "k" * 100_000 + ": 1\n", "study.yaml"),
    "surrogate_escape": (STUDY + 'x: "\\ud800"\n', "study.yaml"),
    "zip": (b"PK\x03\x04" + bytes(100), "study.yaml"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "study.yaml"),
    "binary": (bytes(range(256)), "study.yaml"),
    "html": ("<!DOCTYPE html>\n<html><body>Not found: 404</body></html>\n", "study.yaml"),
    "json_of_other": ('{"a": [1, 2}', "study.yaml"),
    # names
    "name_missing": (study(study=""), "study"),
    "name_empty": (study(study='""'), "study"),
    "name_dots": (study(study='".."'), "study"),
    "name_path": (study(study="a/b"), "study"),
    "name_absolute": (study(study="/etc/passwd"), "study"),
    "name_backslash": (study(study="'a\\b'"), "study"),
    "name_hidden": (study(study=".hidden"), "study"),
    "name_dash": (study(study="-rf"), "study"),
    "name_long": (study(study="a" * 5000), "at most 150"),
    "name_newline": (study(study='"a\\nb"'), "study"),
    "name_trailing_newline": (study(study='"a\\n"'), "study"),
    "name_escape": (study(study='"a\\e[31mb"'), "study"),
    "name_number": (study(study="12"), "study"),
    "name_list": (study(study="[a]"), "study"),
    "name_unicode": (study(study="ｍine"), "study"),
    "name_bidi": (study(study='"mi\\u202Ene"'), "study"),
    "model_name_path": (study(models="{../7b: {aligned: {organism: {size: small}}}}"), "models"),
    "model_name_empty": (study(models='{"": {aligned: {organism: {size: small}}}}'), "models"),
    "models_differ_in_case": (
        study(models=f"{{A: {ORGANISM}, a: {ORGANISM}}}"),
        "case",
    ),
    "models_empty": (study(models="{}"), "models"),
    "models_null": (study(models="null"), "models"),
    "models_list": (study(models="[7b]"), "models"),
    "suite_name_path": (
        study(suites="{../../x: {prompts: {language: a}, measure: {kind: task}}}"),
        "suites",
    ),
    "suite_named_train": (
        study(suites="{train: {prompts: {language: a}, measure: {kind: task}}}"),
        "train",
    ),
    "suites_empty": (study(suites="{}"), "suites"),
    "suite_kind": (study(suites="{a: {prompts: {language: a}, measure: {kind: magic}}}"), "kind"),
    # values
    "rank_zero": (STUDY.replace("train.rank: [8]", "train.rank: [0]"), "train.rank"),
    "rank_negative": (STUDY.replace("train.rank: [8]", "train.rank: [-8]"), "train.rank"),
    "rank_huge": (
        STUDY.replace("train.rank: [8]", "train.rank: [99999999999999999999]"),
        "train.rank",
    ),
    "rank_float": (STUDY.replace("train.rank: [8]", "train.rank: [8.5]"), "train.rank"),
    "rank_empty": (STUDY.replace("train.rank: [8]", "train.rank: []"), "train.rank"),
    "rank_twice": (STUDY.replace("train.rank: [8]", "train.rank: [8, 8]"), "duplicate value"),
    "rank_nested": (STUDY.replace("train.rank: [8]", "train.rank: [[8]]"), "train.rank"),
    "axis_unknown": (STUDY.replace("train.rank: [8]", "train.rnak: [8]"), "train.rnak"),
    "axis_range_endless": (
        STUDY.replace("train.rank: [8]", "train.rank: {low: 1, high: 1e18, step: 1}"),
        "train.rank",
    ),
    "axis_range_reversed": (STUDY.replace("[8]", "{low: 9, high: 1, step: 1}"), "low"),
    "axis_range_step_tiny": (
        STUDY.replace("[null, 0.3]", "{low: 0, high: 1, step: 1e-300}"),
        "apply.threshold",
    ),
    "threshold_two": (STUDY.replace("[null, 0.3]", "[2.0]"), "apply.threshold"),
    "size_zero": (STUDY.replace("size: 1024", "size: 0"), "size"),
    "size_huge": (STUDY.replace("size: 1024", "size: 10000000000000000000000"), "size"),
    "steps_huge": (STUDY.replace("steps: 200", "steps: 1000000000000000"), "steps"),
    "learning_rate_zero": (
        STUDY.replace("learning_rate: 5e-3", "learning_rate: 0"),
        "learning_rate",
    ),
    "learning_rate_text": (
        STUDY.replace("learning_rate: 5e-3", "learning_rate: fast"),
        "learning_rate",
    ),
    "learning_rate_huge": (
        STUDY.replace("learning_rate: 5e-3", "learning_rate: 1e300"),
        "learning_rate",
    ),
    "batch_huge": (STUDY.replace("global_batch: 16", "global_batch: 9999999999"), "global_batch"),
    "tokens_huge": (STUDY.replace("max_tokens: 96", "max_tokens: 99999999999"), "max_tokens"),
    "seed_negative": (study(seeds="[-1]"), "seeds"),
    "seed_huge": (study(seeds=f"[{10**30}]"), "seeds"),
    "seeds_twice": (study(seeds="[0, 0]"), "seeds"),
    "seeds_empty": (study(seeds="[]"), "seeds"),
    "seeds_bool": (study(seeds="[true]"), "seeds"),
    "points_huge": (study(search="{sampler: random, points: 1000000000000}"), "points"),
    "points_zero": (study(search="{points: 0}"), "points"),
    "window_huge": (study(search="{window: 999999999999}"), "window"),
    "sampler_unknown": (study(search="{sampler: magic}"), "sampler"),
    "budget_nan": (study(budget="{usd: .nan}"), "budget"),
    "budget_negative": (study(budget="{hours: -1}"), "budget"),
    "warm_start_path": (study(search="{warm_start: [../../other]}"), "warm_start"),
    "objective_unknown": (study(objectives="[beauty]"), "beauty"),
    "objectives_empty": (study(objectives="[]"), "objectives"),
    "gpus_huge": (
        STUDY.replace("    dtype: float32\ndata", "    dtype: float32\n    gpus: 1000000000\ndata"),
        "gpus",
    ),
    "gpus_zero": (
        STUDY.replace("    dtype: float32\ndata", "    dtype: float32\n    gpus: 0\ndata"),
        "gpus",
    ),
    "hub_id_path": (study(models="{7b: {aligned: {hub: {id: ../../etc}}}}"), "hub"),
    "hub_id_url": (study(models="{7b: {aligned: {hub: {id: 'https://x.org/a'}}}}"), "hub"),
    "hub_file_outside": (
        study(data="{pool: {hub: {id: a/b, file: ../../x.jsonl}}, settings: {size: 3}}"),
        "file",
    ),
    "commit_short": (study(models="{7b: {aligned: {hub: {id: a/b, commit: abc}}}}"), "commit"),
    "sha_wrong": (study(models="{7b: {aligned: {path: {path: m, sha256: xyz}}}}"), "sha256"),
    "package_is_code": (
        study(data="{pool: {path: {path: a.jsonl, package: os.path.join}}, settings: {size: 3}}"),
        "package",
    ),
    "package_empty": (
        study(data="{pool: {path: {path: a.jsonl, package: ''}}, settings: {size: 3}}"),
        "package",
    ),
    "package_outside": (
        study(data="{pool: {path: {path: ../../../x.jsonl, package: yaml}}, settings: {size: 3}}"),
        "package",
    ),
    "path_nul": (study(data='{pool: {path: {path: "a\\0b"}}, settings: {size: 3}}'), "study.yaml"),
    "path_user": (
        study(data="{pool: {path: {path: '~nobody_here/x.jsonl'}}, settings: {size: 3}}"),
        "nobody_here",
    ),
    "path_empty": (study(data="{pool: {path: {path: ''}}, settings: {size: 3}}"), "path"),
    "path_long": (
        study(data=f"{{pool: {{path: {{path: {'a' * 5000}}}}}, settings: {{size: 3}}}}"),
        "4096",
    ),
    "endpoint_password": (
        study(judges=judge("https://me:hunter2@x.org/v1")),
        "password",
    ),
    "endpoint_key": (
        study(judges=judge("https://x.org/v1?api_key=hunter2")),
        "key",
    ),
    "endpoint_file": (
        study(
            judges="{j: {settings: {template: yes-no, endpoint: 'file:///etc/passwd', model: m}}}"
        ),
        "endpoint",
    ),
    "endpoint_text": (
        study(judges="{j: {settings: {template: yes-no, endpoint: 'x y', model: m}}}"),
        "endpoint",
    ),
    "template_missing": (
        STUDY.replace("quantisation: nf4", "chat_template: none.jinja"),
        "none.jinja",
    ),
    "labels_code": (
        STUDY.replace("quantisation: nf4", "labels: {a: '!in($(touch marker))'}"),
        "labels",
    ),
}
PLACES: dict[str, tuple[Make, str, str]] = {
    "missing": (files(), "study.yaml", "no study file"),
    "folder": (files(study__yaml___x="a"), "study.yaml", "study.yaml"),
    "no_such_name": (files(), "quickstrat", "did you mean"),
    "empty_name": (files(), "''", "study"),
    "other_ending": (files(study__txt=STUDY), "study.txt", ".yaml"),
    "path_of_device": (files(), "/dev/null", ".yaml"),
    "name_with_nul_escape": (files(), r"'a\b.yaml'", "no study file"),
    "long_name": (files(), "a" * 5000 + ".yaml", "too long"),
    "dots": (files(), "../..", "study"),
    "markup": (files(), "'[red]x[/red]'", "[red]x[/red]"),
}
CASES = [
    *(
        Case(f"{command}_{name}", f"{command} study.yaml", phrase, files(study__yaml=text))
        for command, names in (
            ("validate", TEXTS),
            (
                "plan",
                ("empty", "utf16", "alias_bomb", "nested_lists", "many_digits", "half", "binary"),
            ),
            (
                "run",
                ("empty", "utf16", "alias_bomb", "nested_lists", "many_digits", "half", "binary"),
            ),
            ("status", ("utf16", "nested_lists", "many_digits", "half")),
            ("report", ("utf16", "nested_lists", "many_digits", "half")),
            ("pick", ("utf16", "nested_lists", "many_digits", "half")),
            ("compare study.yaml", ("utf16", "nested_lists", "many_digits", "half")),
            ("papers", ("utf16", "nested_lists", "many_digits")),
            ("sync", ("utf16", "nested_lists", "many_digits")),
            ("slurm", ("utf16", "nested_lists", "many_digits")),
        )
        for name in names
        for text, phrase in (TEXTS[name],)
    ),
    *(
        Case(
            f"pin_{name}",
            "pin study.yaml --to out.yaml",
            TEXTS[name][1],
            files(study__yaml=TEXTS[name][0]),
        )
        for name in (
            "empty",
            "utf16",
            "alias_bomb",
            "nested_lists",
            "many_digits",
            "half",
            "binary",
            "path_nul",
        )
    ),
    *(
        Case(f"{command}_at_{name}", f"{command} {argument}", phrase, make)
        for command in ("validate", "status", "plan")
        for name, (make, argument, phrase) in PLACES.items()
    ),
]
