"""RESULTS.md is what the writer makes of results/*.json, and these say where their figures come from."""
import json
import re
from pathlib import Path

import pytest

import ablate_grm
from conftest import ROOT
from data import UserError

FILES = sorted((ROOT / "results").glob("*.json"))
# A path of one machine: absolute, or in somebody's home.
MACHINE = re.compile(r"(^|[\s\"'=(\[{,])(/\w|~/|[A-Za-z]:\\)")
ROWS = [{"name": "full", "values": {"rSum": [500.0, 510.0], "difference": None}},
        {"name": "less", "values": {"rSum": [480.0],
                                    "difference": {"mean": -4.0, "low": -6.1, "high": -1.9}}}]
TABLE = {"title": "A title", "conclusion": "It helps.", "command": "python x.py", "commit": "abc1234",
         "machine": "2 cores", "versions": {"torch": "2.14"}, "columns": ["rSum", "difference"], "rows": ROWS}


def strings_of(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings_of(part)


def test_results_md_is_what_the_writer_makes_of_the_files():
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert page == ablate_grm.results_page(ROOT / "results"), "run python ablate_grm.py --write-results"
    assert len(page.splitlines()) <= 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_results_is_complete_and_names_no_path_of_a_machine(path):
    table = ablate_grm.read_table(path)
    assert all(value for key, value in table.items() if key != "notes")
    assert "\n" not in table["conclusion"] and table["command"].startswith("python ")
    for row in table["rows"]:
        assert row.keys() == {"name", "values"} and row["values"].keys() <= set(table["columns"])
    assert not [text for text in strings_of(table) if MACHINE.search(text)]


def test_the_page_has_the_tables_in_order_between_conclusion_and_origin(tmp_path):
    (tmp_path / "0_head.md").write_text("# Head\n")
    assert ablate_grm.results_page(tmp_path) == "# Head\n"
    (tmp_path / "2.json").write_text(json.dumps(TABLE | {"title": "Second", "notes": ["a note"]}))
    (tmp_path / "1.json").write_text(json.dumps(TABLE | {"title": "First"}))
    page = ablate_grm.results_page(tmp_path)
    assert page.startswith("# Head\n") and page.index("## First") < page.index("## Second")
    assert page.endswith("""
## Second

It helps.

|  | rSum | difference |
| --- | --- | --- |
| full | 505.0 ± 7.1 | – |
| less | 480.0 | -4.0 [-6.1, -1.9] |

`python x.py`, commit abc1234, torch 2.14, 2 cores
- a note
""")


@pytest.mark.parametrize("value, text", [
    (None, "–"), (3, "3"), (25000, "25,000"), (0.8843, "0.884"), (1.0712, "1.07"), (535.84, "535.8"),
    (12345.6, "12,346"), ([], "–"), ([1.0], "1.00"), ([0.5, 0.6, 0.7], "0.600 ± 0.100"),
    ({"mean": 0.2, "low": -0.1, "high": 0.5}, "+0.200 [-0.100, +0.500]"), ({"mean": 8.76}, "+8.8")])
def test_the_size_of_a_value_decides_its_digits(value, text):
    assert ablate_grm.cell(value) == text


def test_a_table_that_is_written_again_keeps_what_a_person_wrote(tmp_path):
    path = tmp_path / "results" / "x.json"
    first = ablate_grm.save_table(path, "Title", "python a.py", ["rSum"], [], ["a note"])
    assert first["conclusion"] == "" and {"commit", "versions", "machine"} <= first.keys()
    path.write_text(json.dumps(first | {"title": "Better", "conclusion": "It helps.", "notes": ["mine"]}))
    again = ablate_grm.save_table(path, "Title", "python b.py", ["rSum"], ROWS)
    assert [again[key] for key in ("title", "conclusion", "notes", "command")] == [
        "Better", "It helps.", ["mine"], "python b.py"]
    assert ablate_grm.read_table(path) == again and again["rows"] == ROWS
    path.write_text("{}")
    with pytest.raises(UserError, match="no table: name"):
        ablate_grm.save_table(path, "Title", "python a.py", [], [])


def test_commands_show_no_path_of_the_machine():
    data_root = str(Path.home() / "data")
    argv = ["--data-root", data_root, "--out", str(ROOT / "runs" / "x"), "--set",
            "image.weights=/srv/w/vit/model.safetensors", "a=[/srv/a/b, 2]", "x/y"]
    shown = ablate_grm.shown_command("ablate_grm.py", argv, data_root)
    assert shown == ("python ablate_grm.py --data-root DATA --out runs/x --set "
                     "image.weights=vit/model.safetensors 'a=[a/b, 2]' x/y")
    assert not MACHINE.search(shown) and MACHINE.search(" ".join(argv)) and str(Path.home()) not in shown
