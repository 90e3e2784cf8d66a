from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reqat.config.errors import MissingFileError, ReqatError
from reqat.evaluation import Outcomes

Make = Callable[..., Outcomes]


def test_round_trip(outcomes: Make, tmp_path: Path) -> None:
    correct = np.random.default_rng(0).random((5, 3)) < 0.5
    for response in (None, [f'"{i}" é\n' for i in range(15)]):
        made = outcomes(correct, response=response, metadata={"decoding": "greedy"})
        made.to_parquet(tmp_path / "deep" / "outcomes.parquet", overwrite=response is not None)
        read = Outcomes.from_parquet(tmp_path / "deep" / "outcomes.parquet")
        assert read.digest == made.digest and read.metadata == made.metadata and read.response == made.response
        assert read.to_pandas().equals(made.to_pandas())
        assert list(read.to_pandas().columns)[:4] == ["problem_id", "family", "seed", "correct"]
    assert (read.n_problems, read.seeds, len(read), read.n_unfinished) == (5, (0, 1, 2), 15, 0)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["outcomes.parquet"]


def test_digest_is_of_the_content(outcomes: Make) -> None:
    made = outcomes([[1, 0], [0, 1]])
    assert made.select(np.array([3, 1, 0, 2])).digest == made.digest
    others = [
        outcomes([[1, 0], [1, 0]]),
        outcomes([[1, 0], [0, 1]], n_tokens=[1, 2, 3, 5]),
        outcomes([[1, 0], [0, 1]], finished=[True, True, True, False]),
        outcomes([[1, 0], [0, 1]], response=["", "", "", ""]),
        outcomes([[1, 0], [0, 1]], seed=[0, 1, 0, 2]),
    ]
    assert len({made.digest, *(o.digest for o in others)}) == 6


@pytest.mark.parametrize("keep", [0, 1, 0.3, 0.9, -1])
def test_truncated_file(outcomes: Make, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "o.parquet"
    outcomes(np.ones((40, 2))).to_parquet(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ValueError, match="o.parquet.*damaged.*run its evaluation again"):
        Outcomes.from_parquet(path)


def test_every_flipped_byte_is_noticed(outcomes: Make, tmp_path: Path) -> None:
    path = tmp_path / "o.parquet"
    made = outcomes(np.random.default_rng(0).random((6, 2)) < 0.5, metadata={"decoding": "greedy"})
    made.to_parquet(path)
    data = path.read_bytes()
    for i in range(0, len(data), 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        try:
            read = Outcomes.from_parquet(path)
        except ValueError:
            continue
        assert read.digest == made.digest and read.metadata == made.metadata  # the byte held nothing of ours


def test_other_files(outcomes: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.parquet.*run the evaluation"):
        Outcomes.from_parquet(tmp_path / "absent.parquet")
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"problem_id": ["a"], "seed": [1]}), path)
    with pytest.raises(ValueError, match="schema .*None.*problem_id, seed"):
        Outcomes.from_parquet(path)
    before = path.read_bytes()
    with pytest.raises(ReqatError, match="no file of ours"):
        outcomes([[1, 0]]).to_parquet(path, overwrite=True)
    assert path.read_bytes() == before
    path = tmp_path / "ours.parquet"
    outcomes([[1, 0]]).to_parquet(path)
    table = pq.read_table(path)
    altered = table.set_column(3, "correct", pa.array([True, True]))
    pq.write_table(altered, path)
    with pytest.raises(ValueError, match="was altered"):
        Outcomes.from_parquet(path)
    pq.write_table(table.drop_columns(["n_tokens"]), path)
    with pytest.raises(ValueError, match="damaged: n_tokens missing"):
        Outcomes.from_parquet(path)
    pq.write_table(table.set_column(3, "correct", pa.array([True, None])), path)
    with pytest.raises(ValueError, match="some values missing"):
        Outcomes.from_parquet(path)


def test_killed_while_writing(outcomes: Make, tmp_path: Path) -> None:
    """SIGKILL between writing and renaming: the old file stays whole and nothing else passes for outcomes."""
    path = tmp_path / "o.parquet"
    old = outcomes([[1, 0]])
    old.to_parquet(path)
    script = (
        "import os, signal, sys\n"
        "from reqat.evaluation import Outcomes\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Outcomes(('p', 'q'), ('f', 'f'), [0, 0], [True, True], [3, 3], [True, True]).to_parquet(sys.argv[1], "
        "overwrite=True)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, check=False)
    assert done.returncode == -9
    assert Outcomes.from_parquet(path).digest == old.digest
    left = {p.name for p in tmp_path.iterdir() if p != path}
    assert left and all(name.startswith(".o.parquet.") for name in left)
    outcomes([[1, 1]]).to_parquet(path, overwrite=True)  # the dead process's lock is none


def test_full_disk(outcomes: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o.parquet"
    old = outcomes([[1, 0]])
    old.to_parquet(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReqatError, match=r"o\.parquet: no space left"):
        outcomes([[1, 1]]).to_parquet(path, overwrite=True)
    assert Outcomes.from_parquet(path).digest == old.digest
    assert [p.name for p in tmp_path.iterdir()] == ["o.parquet"]


def test_bad_columns(outcomes: Make) -> None:
    with pytest.raises(ValueError, match="different lengths.*'seed': 3"):
        outcomes([[1, 0]], seed=[0, 1, 2])
    with pytest.raises(ValueError, match="'p0'.*two outcomes.*seed 0"):
        outcomes([[1, 0]], seed=[0, 0])
    with pytest.raises(ValueError, match="empty"):
        Outcomes((), (), np.array([]), np.array([]), np.array([]), np.array([]))


def test_reading_and_statistics_need_no_torch() -> None:
    script = (
        "import sys\n"
        "from reqat.config.policy import Decoding\n"
        "from reqat.evaluation import Outcomes, accuracy, holm, paired\n"
        "assert not {'torch', 'transformers', 'pandas', 'pyarrow', 'scipy'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[2], check=True)


def test_every_damage_is_one_error_that_names_the_file(outcomes: Make, tmp_path: Path) -> None:
    path = tmp_path / "o.parquet"
    outcomes([[1, 0], [0, 1]]).to_parquet(path)
    whole, table = path.read_bytes(), pq.read_table(path)
    for length in (0, 3, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ReqatError, match=r"o\.parquet is damaged.*run its evaluation again"):
            Outcomes.from_parquet(path)
    for name in table.column_names:
        if name == "response":
            continue
        at = table.schema.get_field_index(name)
        for changed in (
            table.drop_columns([name]),
            table.rename_columns([f"x{column}" if column == name else column for column in table.column_names]),
            table.set_column(at, name, table[name].cast(pa.string()).cast(pa.binary())),
            pa.concat_tables([table, table]),
            table.slice(0, 0),
        ):
            pq.write_table(changed, path)
            with pytest.raises(ReqatError, match=r"o\.parquet.*run its evaluation again"):
                Outcomes.from_parquet(path)
    for metadata in ("", "[]", "{", '{"a": 1, "a": 2}'):
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"metadata": metadata.encode()}), path)
        with pytest.raises(ReqatError, match=r"o\.parquet.*run its evaluation again"):
            Outcomes.from_parquet(path)
    with pytest.raises(MissingFileError):
        Outcomes.from_parquet(tmp_path / "absent")
