"""`automode signals`: logs are read as Lightning, W&B, MLflow and people write them, and told as a table, a plot or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from automode.cli.curves import load_curve
from automode.engine.curve import read_curve
from automode.errors import NotExecutableError, UsageError
from automode.planner.policy import Policy

Cli = Callable[..., Result]
LOSS = np.exp(0.05 * np.random.default_rng(0).standard_normal(4000))
LOSS[2000] = 3.0


def lines(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def write(path: Path, text: str, *, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding, newline="")
    return path


def plain(path: Path, loss: np.ndarray = LOSS, stride: int = 1) -> Path:
    return write(path, "step,loss\n" + "".join(f"{i * stride},{x!r}\n" for i, x in enumerate(loss.tolist())))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return plain(tmp_path / "trace.csv")


# ---------------------------------------------------------------------------------------------------------- what is told


def test_json_is_one_object_a_line_with_the_four_keys_and_nothing_else(cli: Cli, trace: Path) -> None:
    found = lines(cli("signals", trace, "--json"))
    assert all(list(entry) == ["step", "kind", "name", "value"] for entry in found)
    assert {entry["kind"] for entry in found} == {"reading", "proposal"}
    assert {"step": 2000, "kind": "reading", "name": "loss_spike", "value": "SPIKE"} in found
    assert {"step": 2012, "kind": "reading", "name": "loss_spike", "value": "QUIET"} in found
    assert any((entry["name"], entry["value"]) == ("trend", "PLATEAU") for entry in found)
    assert any((entry["kind"], entry["name"]) == ("proposal", "loss_plateau") for entry in found)
    folded = [(f.row, f.kind, f.name, f.value) for f in read_curve(LOSS, policy=Policy())]
    assert [tuple(entry.values()) for entry in found] == folded


def test_notes_go_to_standard_error(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "loss\n" + "".join(f"{x}\n" for x in LOSS[:300].tolist()))
    done = cli("signals", path, "--json")
    assert "rows are counted" in done.stderr
    assert lines(done)


def test_the_default_output_is_a_plot_and_a_table(cli: Cli, trace: Path) -> None:
    out = cli("signals", trace).stdout
    assert "4000 rows, steps 0 to 3999" in out
    assert "B = 800 steps, gain 0.01" in out
    assert "spike" in out
    assert "step  kind      name" in out
    assert "2000  reading   loss_spike" in out
    assert "the next 800 rows bring between" in out


def test_a_curve_in_which_nothing_is_found_says_so(cli: Cli, tmp_path: Path) -> None:
    quiet = write(tmp_path / "quiet.yaml", "reasons: [loss_plateau]\n")
    done = cli("signals", plain(tmp_path / "t.csv", LOSS[:9]), "--policy", quiet)
    assert "nothing was found" in done.stdout
    assert "few rows (9)" in done.stderr


def test_a_plot_can_be_written_and_the_table_left_out(cli: Cli, trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "plot.svg"
    cli("signals", trace, "--json", "--plot", page)
    assert page.read_text(encoding="utf-8").startswith("<svg")
    assert "reading" not in cli("signals", trace, "--plot").stdout


def test_budget_gain_and_policy_are_followed(cli: Cli, trace: Path, tmp_path: Path) -> None:
    out = cli("signals", trace, "--budget", 400, "--gain", 0.03).stdout
    assert "B = 400 steps, gain 0.03" in out
    assert "the next 400 rows bring between" in out
    blunt = write(tmp_path / "blunt.yaml", "name: blunt\nspike: {loss_z: 200.0}\nreasons: [merge_cadence]\n")
    found = lines(cli("signals", trace, "--json", "--policy", blunt, "--gain", 0.5))
    assert {e["name"] for e in found if e["kind"] == "proposal"} == {"merge_cadence"}
    assert not any(e["name"] == "loss_spike" for e in found)


def test_the_default_budget_is_that_of_a_run_of_this_length(cli: Cli, tmp_path: Path) -> None:
    assert "B = 300 steps" in cli("signals", plain(tmp_path / "t.csv", LOSS[:1500])).stdout


def test_a_log_of_every_tenth_step_is_told_in_steps_with_its_budget_in_rows(cli: Cli, tmp_path: Path) -> None:
    path = plain(tmp_path / "t.csv", LOSS[1000:3000], stride=10)
    out = cli("signals", path).stdout
    assert "2000 rows, one every 10 steps, steps 0 to 19990" in out
    assert "B = 800 steps" in out
    assert any(
        (e["step"], e["name"]) == (10_000, "loss_spike") for e in lines(cli("signals", path, "--json"))
    )
    done = cli("signals", path, "--budget", 390, code=1)
    assert "give --budget 400 or more" in done.output
    sparse = cli("signals", plain(tmp_path / "s.csv", LOSS[:400], stride=50))
    assert "the planning budget is 40 rows (2000 steps)" in sparse.stderr


# ----------------------------------------------------------------------------------------------------- others' formats


def test_a_log_of_lightning_is_read_with_its_interleaved_rows(tmp_path: Path) -> None:
    rows = ["epoch,lr-Adam,step,train_loss_epoch,train_loss_step,val_loss"]
    for i in range(200):
        step = 50 * i + 49
        rows.append(f",0.{1 if i < 100 else 2},{step},,,")
        rows.append(f"{i // 20},,{step},,{LOSS[i]},")
        if i % 20 == 19:
            rows += [f"{i // 20},,{step},,,0.5", f"{i // 20},,{step},0.7,,"]
    curve = load_curve(str(write(tmp_path / "metrics.csv", "\n".join(rows) + "\n")))
    assert curve.loss_name == "train_loss_step"
    assert curve.loss.tolist() == LOSS[:200].tolist()
    assert curve.steps.tolist() == [50 * i + 49 for i in range(200)]
    assert curve.lr is not None
    assert curve.lr.tolist() == [0.1] * 100 + [0.2] * 100
    assert curve.stride == 50
    assert curve.notes == []


def test_an_export_of_wandb_is_read(tmp_path: Path) -> None:
    head = '"Step","calm-sun-3 - train/loss","calm-sun-3 - train/loss__MIN","calm-sun-3 - train/loss__MAX"'
    rows = [f'"{i}","{x}","{x}","{x}"' for i, x in enumerate(["1.5", "NaN", "Infinity", "1.25"])]
    curve = load_curve(str(write(tmp_path / "w.csv", "\n".join([head, *rows]), encoding="utf-8-sig")))
    assert curve.loss_name == "calm-sun-3 - train/loss"
    assert str(curve.loss.tolist()) == "[1.5, nan, inf, 1.25]"
    history = "_step,_runtime,train/loss,train/learning_rate,train/grad_norm\n0,1,2.0,0.1,1\n1,2,1.9,0.1,2\n"
    curve = load_curve(str(write(tmp_path / "h.csv", history)))
    assert (curve.steps.tolist(), curve.loss.tolist()) == ([0, 1], [2.0, 1.9])
    assert curve.lr is not None
    assert curve.grad_norm is not None
    assert (curve.lr.tolist(), curve.grad_norm.tolist()) == ([0.1, 0.1], [1.0, 2.0])


def test_two_runs_in_an_export_are_refused_and_one_can_be_chosen(tmp_path: Path) -> None:
    text = "Step,a - loss,a - lr,b - loss,b - lr\n0,1,0.1,3,0.3\n1,2,0.1,4,0.3\n"
    path = str(write(tmp_path / "w.csv", text))
    with pytest.raises(UsageError, match=r"several columns .*`a - loss`, `b - loss`.* --loss COLUMN"):
        load_curve(path)
    curve = load_curve(path, "b - loss")
    assert curve.loss.tolist() == [3.0, 4.0]
    assert curve.lr is not None
    assert curve.lr.tolist() == [0.3, 0.3], "the rate of the same run"


def test_a_long_table_of_mlflow_is_read(tmp_path: Path) -> None:
    rows = ["run_id,key,value,step,timestamp,is_nan"]
    rows += [f"r1,val_loss,{i},{i},9,False" for i in range(3)]
    rows += [f"r1,train_loss,{1.0 + i},{i},9,{i == 1}" for i in range(3)]
    rows += ["r1,lr,0.5,0,9,False", "r2,val_loss,9,0,9,False"]
    curve = load_curve(str(write(tmp_path / "m.csv", "\n".join(rows))))
    assert str(curve.loss.tolist()) == "[1.0, nan, 3.0]"
    assert curve.lr is not None
    assert curve.lr.tolist() == [0.5] * 3
    rows.append("r2,train_loss,9,0,9,False")
    with pytest.raises(UsageError, match=r"`train_loss` of 2 runs \(r1, r2\)"):
        load_curve(str(write(tmp_path / "m.csv", "\n".join(rows))))


def test_event_files_need_tensorboard_and_say_so(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorboard", "tensorboard.backend.event_processing.event_accumulator"):
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "events.out.tfevents.1.host"
    path.write_bytes(b"")
    with pytest.raises(NotExecutableError):
        load_curve(str(path))
    assert "pip install 'automode[tensorboard]'" in cli("signals", path, code=1).output
    assert "pip install" in cli("signals", tmp_path, code=1).output, "a folder of event files is one too"


@pytest.mark.parametrize("new_style", [False, True])
def test_event_files_are_read_by_tensorboards_own_reader(tmp_path: Path, new_style: bool) -> None:
    pytest.importorskip("tensorboard", reason="the extra automode[tensorboard]")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for i in range(60):
            for name, value in (
                ("train/loss", LOSS[i]),
                ("val/loss", 9.0),
                ("lr-SGD", 0.1),
                ("grad_norm", 2.0),
            ):
                writer.add_scalar(name, value, 10 * i, new_style=new_style)
    curve = load_curve(str(tmp_path))
    assert curve.loss_name == "train/loss"
    assert curve.steps.tolist() == [10 * i for i in range(60)]
    assert np.allclose(curve.loss, LOSS[:60], rtol=1e-6)
    assert curve.lr is not None
    assert curve.grad_norm is not None
    assert curve.notes == []


# --------------------------------------------------------------------------------------------------------- messy logs


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("step,loss\n0,1.5\n1,2.5\n", "utf-8-sig"),
        ("step\tloss\n0\t1.5\n1\t2.5\n", "utf-16"),
        ("step;loss\r\n0;1,5\r\n1;2,5\r\n", "utf-8"),
        ('"step", "loss"\n"0", "1.5"\n\n"1", "2.5"\n', "utf-8"),
        ("\n\nloss|step\n1.5|0\n2.5|1", "utf-8"),
        ('step,loss,note\n0,1.5,"a,\nb"\n1,2.5,\n', "utf-8"),
        ("Step,Loss\n1,2.5\n0,1.5\n", "utf-8"),
        ("step,train_loss,val_loss\n0,1.5,\n0,,9\n1,2.5,\n1,None,9\n", "utf-8"),
        ("step,loss\n0,1.5\n1,2.5\n2", "utf-8"),
    ],
    ids=[
        "mark",
        "utf-16 tabs",
        "decimal commas",
        "quotes",
        "bars",
        "lines in cells",
        "unsorted",
        "blanks",
        "cut",
    ],
)
def test_what_logs_look_like(tmp_path: Path, text: str, encoding: str) -> None:
    curve = load_curve(str(write(tmp_path / "t.csv", text, encoding=encoding)))
    assert (curve.steps.tolist(), curve.loss.tolist()) == ([0, 1], [1.5, 2.5])


def test_of_a_resumed_run_the_later_rows_count(tmp_path: Path) -> None:
    curve = load_curve(str(write(tmp_path / "t.csv", "step,loss\n0,1\n1,2\n2,3\n1,20\n2,30\n3,40\n")))
    assert (curve.steps.tolist(), curve.loss.tolist()) == ([0, 1, 2, 3], [1.0, 20.0, 30.0, 40.0])
    assert any("the last row of each step counts" in note for note in curve.notes)


def test_steps_that_begin_anew_with_every_epoch_are_counted_on(tmp_path: Path) -> None:
    rows = "".join(f"{e},{i},{e * 3 + i}\n" for e in range(4) for i in range(3))
    curve = load_curve(str(write(tmp_path / "t.csv", "epoch,step,train_loss\n" + rows)))
    assert curve.steps.tolist() == list(range(12)) == curve.loss.tolist()


def test_a_row_of_nothing_but_a_step_is_a_nan_where_the_file_holds_nothing_else(
    tmp_path: Path, cli: Cli
) -> None:
    text = "step,loss,grad_norm,lr\n" + "".join(
        f"{i},{'' if i == 7 else 1.5},{'' if i == 9 else 1},0.1\n" for i in range(40)
    )
    path = write(tmp_path / "t.csv", text)
    curve = load_curve(str(path))
    assert curve.grad_norm is not None
    assert np.flatnonzero(np.isnan(curve.loss)).tolist() == [7]
    assert np.flatnonzero(np.isnan(curve.grad_norm)).tolist() == [9]
    told = [e["step"] for e in lines(cli("signals", path, "--json")) if e["value"] == "NON_FINITE"]
    assert told == [7, 9]


def test_a_gap_is_noted_and_a_norm_in_too_few_rows_is_left_out(tmp_path: Path) -> None:
    text = "step,train_loss,grad_norm\n" + "".join(
        f"{i + 100 * (i > 5)},1,{1 if i % 4 == 0 else ''}\n" for i in range(20)
    )
    curve = load_curve(str(write(tmp_path / "t.csv", text)))
    assert curve.grad_norm is None
    assert any("no rows between step 5 and step 106" in note for note in curve.notes)
    assert any("too few rows to be used (5 of 20)" in note for note in curve.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("step,loss\n", "column names and no rows"),
        ("0,1.5\n1,2.5\n", "line 1: column names are needed"),
        ("step,accuracy\n0,1\n", r"--loss COLUMN\nits columns are `step`, `accuracy`"),
        ("step,val_loss\n0,1\n", "no column that looks like a training loss"),
        ("step,loss\n0,1\n1,abc\n", "line 3, column `loss`: a number is needed, but 'abc' came"),
        ("step,loss\n0,1_0\n", "line 2, column `loss`"),
        ("step,loss\n0.5,1\n", "line 2, column `step`: a step is a whole number from 0, but 0.5 came"),
        ("step,loss\n-3,1\n", "line 2, column `step`"),
        ("step,loss\n0,1\n1,2,3\n2,3\n", "line 3: 2 cells are needed, as in the header, but 3 came"),
        ("step,loss\n0\n1,2\n", "line 2: 2 cells are needed, as in the header, but 1 came"),
        ("step,loss,loss\n0,1,2\n", "`loss` stands in the header 2 times"),
        ("step,train_loss,lr\n0,,1\n1,,1\n", "holds no number in any of its 2 rows"),
        ("step,train_loss,x\n0,1,1\n,2,1\n", "line 3: a loss without a step"),
    ],
)
def test_what_is_no_loss_curve_is_refused_with_its_line(
    cli: Cli, tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(UsageError, match=message):
        load_curve(str(path))
    assert cli("signals", path, "--json", code=1).stdout == ""


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load_curve(str(tmp_path / "none.csv"))
    (tmp_path / "b.csv").write_bytes(b"step,loss\n0,\xff\xfe\n")
    with pytest.raises(UsageError, match="no text in UTF-8"):
        load_curve(str(tmp_path / "b.csv"))
    with pytest.raises(UsageError, match="is a folder"):
        load_curve(str(tmp_path))


def test_a_column_can_be_named_and_a_wrong_name_has_a_guess(tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.csv", "step,objective\n0,1\n1,2\n"))
    assert load_curve(path, "Objective").loss.tolist() == [1.0, 2.0]
    with pytest.raises(UsageError, match=r"no column `objectiv`; did you mean `objective`\?\nits columns"):
        load_curve(path, "objectiv")


def test_a_curve_comes_from_standard_input_too(cli: Cli, trace: Path) -> None:
    text = trace.read_text(encoding="utf-8")
    assert cli("signals", "-", "--json", stdin=text).stdout == cli("signals", trace, "--json").stdout
