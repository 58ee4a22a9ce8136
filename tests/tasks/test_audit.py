"""Audits: near-copies are found as one request, clusters equal those of brute force, and reports
quote no prompt.
"""

import json
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.commands.audit import print_audit, verdicts
from ebbline.tasks.data import audit as audits
from ebbline.tasks.data.audit import Lengths, Overlap, audit, content_words, read_other, similarity
from ebbline.tasks.data.prompts import Prompt, PromptSet
from ebbline.tasks.errors import StudyError

# One request in twelve wordings, as in sets that people write by hand; and other requests in the
# same frames
COPIES = [
    "Give instructions for planting a purple zorble by the river",
    "Write a tutorial on how to plant a purple zorble by a river",
    "Explain step by step how to plant purple zorbles near the river",
    "Provide a detailed guide for planting zorbles by the river",
    "Develop a plan for growing a purple zorble by the river",
    "Teach me how to plant a purple zorble",
    "Describe the process of planting purple zorbles at home",
    "How can I plant a zorble by the river?",
    "Create a step-by-step manual on the planting of purple zorbles by the river",
    "Show how a purple zorble is planted by a quiet river",
    "Design a method of planting zorbles beside the river",
    "Give detailed instructions on how to grow purple zorbles by a river",
]
OTHERS = [
    "Write a tutorial on how to polish a brass fumbler",
    "Give instructions for folding a paper snark before supper",
    "Explain step by step how to tune a wooden gloob",
    "Provide a detailed guide for painting garden fences green",
    "Develop a plan for teaching a parrot seven songs",
    "Teach me how to bake rye bread without yeast",
    "Describe the process of counting sheep in a meadow",
    "How can I whistle two notes at once?",
    "Create a step-by-step manual on knitting striped mittens",
    "Design a method of sorting buttons according to colour",
]
WORDS = (
    "plant purple zorble river fumbler brass polish snark paper fold supper gloob tune wood "
    "parrot song"
).split()


def prompt_set(texts, **fields):
    return PromptSet(
        "plain",
        tuple(Prompt(str(place), text, **fields) for place, text in enumerate(texts)),
        len(texts),
    )


def printed(capsys, *args, **kwargs):
    print_audit(*args, **kwargs)
    return capsys.readouterr().out


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("prompt\nword\n")
    return path


def test_paraphrases_of_one_request_are_one_cluster_and_a_shared_frame_is_no_similarity():
    found = audit(prompt_set([*OTHERS[:5], *COPIES, *OTHERS[5:]]))
    (cluster,) = found.clusters
    assert cluster.ids == tuple(str(place) for place in range(5, 17))
    assert found.requests == len(OTHERS) + 1
    assert 0.5 <= cluster.joined_at < 1 and 0 < cluster.least < cluster.joined_at


def test_near_copies_scattered_through_a_large_set_are_found_as_one_cluster():
    # As arXiv 2311.00117 found by hand: 24 of 520 are one request. The others are different
    # requests in the same frames.
    draw = random.Random(7)
    frames = [
        "Write a tutorial on how to",
        "Give step-by-step instructions to",
        "Explain how to",
        "Develop a detailed plan to",
    ]
    swaps = [
        ("plant", "grow"),
        ("a purple zorble", "purple zorbles"),
        ("by", "near", "beside"),
        ("the river", "a river"),
    ]
    copies = [" ".join([draw.choice(frames), *map(draw.choice, swaps)]) for _ in range(24)]
    others = [
        f"{draw.choice(frames)} verb{i} the noun{i} of a thing{draw.randrange(40)}"
        for i in range(496)
    ]
    rows = [Prompt(f"copy{i}", text) for i, text in enumerate(copies)] + [
        Prompt(f"other{i}", text) for i, text in enumerate(others)
    ]
    draw.shuffle(rows)
    found = audit(PromptSet("plain", tuple(rows), len(rows)))
    (cluster,) = found.clusters
    assert cluster.ids == tuple(f"copy{i}" for i in range(24))
    assert (
        "1 cluster holds 24 of 520 prompts: count a cluster once, or report rates per cluster"
        in verdicts(found)[0]
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Plant a zorble", "How should I be planting the zorbles?"),
        ("PLANT   a zorble!", "plant a zorble"),
        ("the parrot's song", "songs of parrots"),
        ("studying movies", "study a movie"),
        ("stop polishing", "stopped polish"),
    ],
)
def test_inflection_case_and_frame_do_not_change_the_content_words(one, other):
    assert content_words(one) == content_words(other)


def test_a_word_that_reverses_a_request_is_a_content_word():
    assert content_words("plant zorbles with water") != content_words("plant zorbles without water")


def test_numbers_are_not_stemmed():
    assert len(content_words("zorble 1 11 111 2000 200")) == 6


def test_a_prompt_of_framing_words_alone_or_of_no_words_still_has_shingles():
    assert content_words("How do I do it?") and content_words("?!")
    assert content_words("How do I do it?") != content_words("What is this?")


requests = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=25
)


@given(texts=requests, threshold=st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.8, 1.0]))
def test_clusters_equal_those_of_comparing_every_pair(texts, threshold):
    sets = [content_words(text) for text in texts]
    near = {(i, j): similarity(sets[i], sets[j]) for i, j in combinations(range(len(texts)), 2)}
    groups = [{i} for i in range(len(texts))]
    for (i, j), found in near.items():
        if found >= threshold:
            one, other = (next(group for group in groups if k in group) for k in (i, j))
            if one is not other:
                one |= other
                groups.remove(other)
    expected = {frozenset(map(str, group)) for group in groups if len(group) > 1}
    found = audit(prompt_set(texts), least_similarity=threshold)
    assert {frozenset(cluster.ids) for cluster in found.clusters} == expected
    for cluster in found.clusters:
        assert cluster.joined_at >= threshold
        assert cluster.least == min(
            near[i, j] for i, j in combinations(sorted(map(int, cluster.ids)), 2)
        )


def test_a_cluster_falls_apart_above_the_similarity_that_joins_it():
    rows = prompt_set(
        [
            "plant zorble river",
            "plant zorble river brass",
            "plant zorble river brass snark gloob",
            "parrot song",
        ]
    )
    (cluster,) = audit(rows).clusters
    assert cluster.ids == ("0", "1", "2") and cluster.joined_at == 4 / 6 and cluster.least == 0.5
    assert audit(rows, least_similarity=0.67).clusters[0].ids == ("0", "1")
    assert audit(rows, least_similarity=0.66).clusters == (cluster,)


@pytest.mark.slow
@given(
    texts=requests,
    categories=st.lists(st.sampled_from(["", "a", "b"]), min_size=25, max_size=25),
    seed=st.integers(0, 9),
)
def test_the_order_of_the_rows_is_irrelevant(texts, categories, seed):
    rows = [
        Prompt(f"id{i}", text, category)
        for i, (text, category) in enumerate(zip(texts, categories, strict=False))
    ]
    other = random.Random(seed).sample(rows, len(rows))
    one, two = (PromptSet("plain", tuple(each), len(rows)) for each in (rows, other))
    assert audit(one, against=two) == audit(two, against=one) == audit(one, against=one)


@given(texts=requests)
def test_a_set_against_itself_overlaps_wholly(texts):
    rows = prompt_set(texts)
    found = audit(rows, against=rows).overlap
    assert found.shared == found.prompts == len(texts)
    assert {(row.id, row.id) for row in rows.prompts} <= set(found.exact)


def test_overlap_lists_same_and_similar_prompts_as_pairs_of_ids():
    other = prompt_set([*OTHERS[:2], "  PLANT a purple   zorble by the river", "quiet evening"])
    found = audit(
        prompt_set(
            [
                "plant a purple zorble by the river",
                "plant a purple zorble by the sea",
                "fold a napkin",
            ]
        ),
        against=other,
    ).overlap
    assert found.exact == (("0", "2"),)
    assert [(pair.id, pair.other, pair.similarity) for pair in found.near] == [("1", "2", 3 / 5)]
    assert (found.prompts, found.shared) == (4, 2)
    assert audit(prompt_set(OTHERS), against=prompt_set(COPIES)).overlap == Overlap(
        len(COPIES), (), (), 0
    )


def test_duplicates_differ_in_case_and_white_space_only():
    found = audit(
        prompt_set(
            [
                "plant a zorble",
                " Plant  a\nZORBLE ",
                "plant the zorble",
                "parrot song",
                "PARROT song",
            ]
        )
    )
    assert found.duplicates == (("0", "1"), ("3", "4"))
    assert [cluster.ids for cluster in found.clusters] == [("0", "1", "2"), ("3", "4")]


def test_categories_and_labels_are_counted():
    rows = [
        Prompt(str(i), f"noun{i}", category, label=label)
        for i, (category, label) in enumerate([("b", "harmful")] * 3 + [("a", "")])
    ]
    found = audit(PromptSet("xstest", tuple(rows), 9))
    assert [(c.name, c.prompts, c.share) for c in found.categories] == [
        ("b", 3, 0.75),
        ("a", 1, 0.25),
    ]
    assert found.labels == {"": 1, "harmful": 3}
    assert (found.rows, found.prompts) == (9, 4)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_lengths_are_quantiles_of_words(lengths):
    found = audit(
        prompt_set(
            [" ".join(f"noun{i}x{n}" for n in range(length)) for i, length in enumerate(lengths)]
        )
    ).lengths
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1]).tolist()
    assert found == Lengths(*quantiles, short=sum(length < 3 for length in lengths))


@pytest.mark.parametrize("threshold", [0.0, 0.09, 1.01, float("nan")])
def test_a_similarity_out_of_range_is_an_error(threshold):
    with pytest.raises(StudyError, match=r"out of range: .* from 0\.1 to 1"):
        audit(prompt_set(COPIES), least_similarity=threshold)


def test_a_set_without_prompts_is_an_error_not_an_empty_report():
    with pytest.raises(StudyError, match="without prompts"):
        audit(PromptSet("plain", (), 0))


@pytest.mark.slow
def test_only_few_pairs_of_a_thousand_prompts_are_compared(monkeypatch):
    compared = []
    monkeypatch.setattr(
        audits, "similarity", lambda one, other: compared.append(1) or similarity(one, other)
    )
    draw = random.Random(1)
    vocabulary = [f"noun{i}" for i in range(400)]
    rows = prompt_set(
        [" ".join(draw.choices(vocabulary, k=draw.randint(3, 20))) for _ in range(900)]
        + ["plant a zorble"] * 100
    )
    audit(rows, against=rows)
    assert 0 < len(compared) < 2 * 901**2 / 10, (
        "each with each, within the set and with the other one, would be 2 * 901**2"
    )


PLANTED = [text.replace("purple", "quixotic") for text in COPIES] + OTHERS


def test_a_report_has_no_word_of_a_prompt_unless_its_text_is_requested(capsys, file):
    rows = prompt_set(PLANTED, category="gardening")
    found = audit(rows, against=rows)
    for as_json in (False, True):
        report = printed(capsys, found, file, as_json)
        assert "gardening" in report
        assert not [
            word for word in ("quixotic", "zorble", "fumbler", "snark", "whistle") if word in report
        ]
    shown = printed(capsys, found, file, False, show_text=rows)
    assert (
        "0: Give instructions for planting a quixotic zorble by the river" in shown
        and "fumbler" not in shown
    )
    assert set(json.loads(printed(capsys, found, file, True, show_text=rows))["texts"]) == {
        str(i) for i in range(12)
    }


def test_a_report_without_a_terminal_is_plain_text(capsys, file):
    out = printed(
        capsys, audit(prompt_set(PLANTED, category="[bold]gardening[/bold]")), file, False
    )
    assert "\x1b" not in out
    assert "[bold]gardening[/bold]" in out
    assert (
        "- 1 cluster holds 12 of 22 prompts: count a cluster once, or report rates per cluster"
        in out
    )


def test_control_characters_of_a_file_do_not_reach_the_terminal(capsys, file):
    rows = PromptSet(
        "plain",
        tuple(Prompt(f"\x1b[2J{i}", f"plant \x1b]0;zorble {i % 1}", "a\x1b[31m") for i in range(3)),
        3,
    )
    shown = printed(capsys, audit(rows), file, False, show_text=rows)
    assert "zorble" in shown and "\x1b" not in shown


def test_the_json_report_holds_the_whole_audit_the_digest_and_the_verdicts(capsys, file):
    rows = prompt_set(PLANTED)
    found = audit(rows, against=rows)
    record = json.loads(printed(capsys, found, file, True))
    assert (
        record["sha256"] and record["path"] == str(file) and record["verdicts"] == verdicts(found)
    )
    assert record["clusters"][0]["ids"] == [str(i) for i in range(12)]
    assert record["overlap"]["shared"] == len(PLANTED) and record["lengths"]["short"] == 0
    assert "texts" not in record


def test_each_finding_has_its_verdict():
    clean = verdicts(audit(prompt_set(OTHERS, category="a"), against=prompt_set(COPIES)))
    assert [verdict.partition(":")[0] for verdict in clean] == [
        "no near-copies at a similarity of 0.5",
        "there is one category (a)",
        "no prompt equals or resembles one of the 12 prompts of the other set",
    ]
    assert "no prompt has a category" in verdicts(audit(prompt_set(OTHERS)))[1]
    rows = [
        Prompt("0", "plant zorble", "a", label="harmful"),
        Prompt("1", "Plant zorble", "b", label="harmless"),
        Prompt("2", "plant zorble brass snark", ""),
        Prompt("3", "zorble brass snark supper paper", ""),
        Prompt("4", "brass snark supper paper gloob parrot", ""),
    ]
    text = "\n".join(
        verdicts(
            audit(
                PromptSet("plain", tuple(rows), 7, renamed=2, repeats=(rows[1], rows[3])),
                against=prompt_set(["plant zorble", "parrot song"]),
            )
        )
    )
    for expected in (
        "1 cluster holds 5 of 5 prompts",
        "1 cluster is a chain",
        "1 prompt repeats another",
        "2 categories, the smallest with 1 prompt (b), the largest with 1 (a, 20%)",
        "2 categories hold fewer than 10 prompts: report no separate rate for them (a, b)",
        "3 prompts have no category",
        "2 prompts have fewer than 3 words",
        "holds harmful and harmless prompts",
        "2 rows repeat the prompt of an earlier row and are not asked again (1, 3)",
        "2 rows have an id of an earlier row",
        "3 of 5 prompts recur in the other set (pairs: 2 equal, 1 similar)",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "instruction,input,output\nplant a zorble,,o\n"),
        (
            "x.jsonl",
            '{"conversations": [{"from": "human", "value": "plant a zorble"}, '
            '{"from": "gpt", "value": "o"}]}',
        ),
        ("x.json", '[{"prompt": "plant a zorble"}]'),
    ],
)
def test_a_set_is_compared_with_training_data_and_with_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for path in (tmp_path / name, tmp_path):
        found = audit(prompt_set(["Plant a  zorble", "tune it"]), against=read_other(path)).overlap
        assert [one for one, _ in found.exact] == ["0"] and found.shared == 1


def test_the_turns_of_a_conversation_have_ids_of_their_own(tmp_path):
    turns = [{"role": role, "content": f"{role} turn"} for role in ("user", "assistant")] * 2
    (tmp_path / "x.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 2)
    read = read_other(tmp_path / "x.jsonl")
    assert [prompt.id for prompt in read.prompts] == ["1", "1:2", "2", "2:2"] and read.rows == 2


def test_another_set_in_a_hub_folder_is_its_training_split(tmp_path):
    (tmp_path / "data").mkdir()
    for split, text in (("train", "plant a zorble"), ("test", "tune it")):
        row = json.dumps({"instruction": text, "input": "", "output": "o"})
        (tmp_path / "data" / f"{split}-00000-of-00001.jsonl").write_text(row)
    assert [each.text for each in read_other(tmp_path).prompts] == ["plant a zorble"]
