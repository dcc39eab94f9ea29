"""What `t2i data filter` keeps, counted rule by rule, and what an expression cannot do."""

from __future__ import annotations

import io
import json
import math
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.data.selection import listed
from t2i.errors import ConfigError, DataError
from t2i_cli.data import filter as command
from t2i_pipelines.filtering.filter import filter_shards, filter_table
from t2i_pipelines.filtering.judge import Judge
from t2i_pipelines.filtering.presets import PRESETS, Rule, bound, languages, preset
from t2i_pipelines.filtering.repack import repack
from t2i_pipelines.shard_metadata import metadata_of


def nothing(done: int, total: int) -> None:
    pass


def laion(rows: list[dict]) -> pa.Table:
    """A table as LAION publishes it: sizes are floating-point numbers, names in capitals."""
    types = {"URL": pa.string(), "TEXT": pa.string(), "WIDTH": pa.float64(), "HEIGHT": pa.float64()}
    types |= {"similarity": pa.float64(), "punsafe": pa.float32(), "pwatermark": pa.float32()}
    types |= {"AESTHETIC_SCORE": pa.float32(), "LANGUAGE": pa.string()}
    return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()})


def counts(judge: Judge) -> list[tuple[int, int]]:
    return [(tally.removed, tally.unknown) for tally in judge.tallies[1:]]


def test_the_published_recipes():
    good = {"WIDTH": 512, "HEIGHT": 512, "AESTHETIC_SCORE": 5.01, "pwatermark": 0.49}
    rows = [
        good,
        good | {"WIDTH": 511},
        good | {"HEIGHT": math.nan},  # not larger than every number
        good | {"AESTHETIC_SCORE": 5.0},
        good | {"AESTHETIC_SCORE": math.nan},
        good | {"pwatermark": 0.5},
        good | {"pwatermark": None},
        good | {"WIDTH": 511, "pwatermark": 0.9},  # counted once, by the first rule
    ]
    judge = Judge(preset("improved-aesthetics"))
    assert judge.keeps(laion(rows), "a table").tolist() == [True] + [False] * 7
    assert counts(judge) == [(2, 1), (1, 1), (1, 1)]
    sizes = [(1024, 1024), (1023, 2000), (2000, 1023), (4000, 1024)]
    large = laion([{"WIDTH": width, "HEIGHT": height} for width, height in sizes])
    assert Judge(preset("laion-high-resolution")).keeps(large, "").tolist() == [True, False, False, True]
    with pytest.raises(ConfigError, match="allowed: laion-high-resolution, improved-aesthetics"):
        preset("laion")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "WIDTH": st.sampled_from([100.0, 512.0, 1024.0, math.nan, None]),
                "HEIGHT": st.sampled_from([0.0, 512.0, 2000.0, None]),
                "similarity": st.sampled_from([0.2, 0.3, 0.31, None]),
                "TEXT": st.sampled_from(["a", "zwölf Zeichen", None]),
                "LANGUAGE": st.sampled_from(["en", "EN", "de", None]),
            }
        ),
        max_size=20,
    )
)
def test_rules_in_order_agree_with_a_loop(rows):
    """Against a plain loop over the rows, NULL and NaN included."""

    def value(row, name):
        return None if row[name] is None or math.isnan(row[name]) else row[name]

    def shorter(row):
        sides = value(row, "WIDTH"), value(row, "HEIGHT")
        return None if None in sides else min(sides) >= 512

    def aspect(row):
        width, height = value(row, "WIDTH"), value(row, "HEIGHT")
        return None if width is None or not height else width / height <= 1.0

    conditions = [
        lambda row: None if row["similarity"] is None else row["similarity"] >= 0.3,
        lambda row: None if row["TEXT"] is None else len(row["TEXT"]) >= 12,
        aspect,
        shorter,
        lambda row: None if row["LANGUAGE"] is None else row["LANGUAGE"].lower() in ("en", "fr"),
    ]
    rules = bound("similarity", 0.3, None) + bound("caption-length", 12, None)
    rules += bound("aspect-ratio", None, 1.0) + bound("shorter-side-px", 512, None) + [languages("en, FR")]
    judge = Judge(rules)
    expected, tallies = [], [[0, 0] for _ in rules]
    for row in rows:
        met = [condition(row) for condition in conditions]
        first = next((number for number, each in enumerate(met) if not each), None)
        expected.append(first is None)
        if first is not None:
            tallies[first][met[first] is None] += 1
    assert judge.keeps(laion(rows), "").tolist() == expected
    assert counts(judge) == [tuple(each) for each in tallies]


def test_order_holds_over_many_chunks():
    parts = [
        laion([{"similarity": i % 7 / 10} for i in range(start, start + 1000)])
        for start in range(0, 50_000, 1000)
    ]
    kept = Judge(bound("similarity", 0.3, None)).keeps(pa.concat_tables(parts), "")
    assert kept.tolist() == [i % 7 >= 3 for i in range(50_000)]


@pytest.mark.parametrize(
    "expression",
    [
        "length(text) > 3 and Width >= 100",
        "LENGTH(caption) > 3 AND original_width >= 100 -- of the source",
        "aesthetic > 5 OR aesthetic IS NULL",
        "caption LIKE '%;%' OR caption = 'a) UNION SELECT (1' OR TRUE",
    ],
)
def test_expressions(expression):
    table = laion([{"TEXT": "four", "WIDTH": 100, "HEIGHT": 1}])
    assert Judge([Rule(expression, expression)]).keeps(table, "").tolist() == [True]


@pytest.mark.parametrize(
    "expression",
    [
        "(SELECT content FROM read_text('{file}')) LIKE '%'",
        "EXISTS (FROM read_csv('{file}'))",
        "similarity > ALL (SELECT 1)",
        "TRUE); COPY (SELECT 1) TO '{other}'; SELECT (TRUE",
        "TRUE; COPY (SELECT 1) TO '{other}'",
        "TRUE UNION SELECT * FROM read_csv('{file}')",
        "TRUE) UNION SELECT (TRUE",
        "TRUE) OR (TRUE",
        "TRUE LIMIT 1",
        "TRUE ORDER BY similarity",
        "TRUE GROUP BY ALL",
        "TRUE QUALIFY TRUE",
        "row_number() OVER () < 2",
        "COUNT(*) > 1",
        "COLUMNS(*) > 1",
        "similarity > ?",
        "similarity",
        "'{file}'",
        "similarity >",
        "nosuch(similarity)",
        "sniff_csv('{file}') IS NULL",
        "",
    ],
)
def test_what_an_expression_may_not_be(expression, tmp_path):
    secret, other = tmp_path / "secret.csv", tmp_path / "other"
    secret.write_text("a,b\n1,2\n")
    rule = Rule("hostile", expression.format(file=secret, other=other))
    with pytest.raises(ConfigError, match="'hostile'"):
        Judge([rule]).keeps(laion([{"similarity": 1.0}]), "a table")
    assert not other.exists()


def test_the_connection_itself_is_closed_to_files(tmp_path):
    """Behind the check of the expression stands a second wall."""
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    local = laion([])  # noqa: F841  duckdb finds Python's variables by name unless told not to
    connection = Judge([])._connection
    for statement in (
        f"SELECT * FROM read_csv('{tmp_path}/secret.csv')",
        f"SELECT * FROM sniff_csv('{tmp_path}/secret.csv')",
        f"COPY (SELECT 1) TO '{tmp_path}/other.csv'",
        f"ATTACH '{tmp_path}/other.db'",
        "SET enable_external_access=true",
        "INSTALL httpfs",
        "SELECT * FROM local",
    ):
        with pytest.raises(Exception, match=r"(?i)disabled|locked|does not exist|cannot be"):
            connection.execute(statement).fetchall()
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_a_missing_column_is_named_with_what_is_there():
    table = laion([]).drop_columns(["pwatermark"])
    judge = Judge(PRESETS["improved-aesthetics"])
    with pytest.raises(
        DataError, match=r"needs the column pwatermark, which x.parquet does not have"
    ) as error:
        judge.keeps(table, "x.parquet")
    assert "it has URL, TEXT, WIDTH, HEIGHT" in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_table(tmp_path, kind):
    rows = [
        {"URL": f"u{i}", "TEXT": "1e5", "WIDTH": i, "HEIGHT": 600, "LANGUAGE": "nan"} for i in range(1000)
    ]
    source = tmp_path / f"table.{kind}"
    if kind == "parquet":
        parquet.write_table(laion(rows), source, row_group_size=64)
    else:
        source.write_text("URL,TEXT,WIDTH,HEIGHT\n" + "".join(f"u{i},1e5,{i},600\n" for i in range(1000)))
    seen = []
    rules = [*bound("shorter-side-px", 590, 600), Rule("odd", "width % 2 = 1")]
    report = filter_table(str(source), tmp_path / "out.parquet", rules, lambda *each: seen.append(each))
    assert (report.rows, report.kept) == (1000, 205)
    assert [(tally.removed, tally.unknown) for tally in report.tallies] == [
        (0, 0),
        (590, 0),
        (0, 0),
        (205, 0),
    ]
    kept = parquet.read_table(tmp_path / "out.parquet")
    assert kept["URL"].to_pylist() == [f"u{i}" for i in range(591, 1000, 2)]
    assert set(kept["TEXT"].to_pylist()) == {"1e5"}
    assert seen[-1] == (1000, 1000)
    if kind == "parquet":
        assert kept.equals(
            parquet.read_table(source).filter(
                pa.array([r["WIDTH"] % 2 == 1 and r["WIDTH"] >= 590 for r in rows])
            )
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", source.name]


def test_nothing_left_writes_nothing(tmp_path):
    parquet.write_table(laion([{"similarity": 0.1}]), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="No sample is left"):
        command.run([str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), "--min-similarity", "0.3"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]
    with pytest.raises(DataError, match="is also the source"):
        filter_table(str(tmp_path / "in.parquet"), tmp_path / "in.parquet", [], nothing)


def img2dataset_shard(folder: Path, number: int, samples: int, **columns) -> str:
    """A tar without pictures and its table, which has a row for a failed download as well."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:05d}{i:04d}" for i in range(samples)]
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
        for name in names[:-1]:
            content = json.dumps({"key": name}).encode()
            info = tarfile.TarInfo(f"{name}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    status = ["success"] * (samples - 1) + ["failed_to_download"]
    table = {
        "key": names,
        "status": status,
        "original_width": [600] * samples,
        "original_height": [700] * samples,
    }
    parquet.write_table(pa.table(table | columns), folder / f"{number:05d}.parquet")
    return str(folder / f"{number:05d}.tar")


def kept_keys(path: Path) -> dict[str, list[str]]:
    return {Path(each.url).name: each.keys.to_pylist() for each in listed([str(path)])}


def test_shards_with_scores_beside_them(tmp_path):
    first = img2dataset_shard(tmp_path, 0, 5, similarity=[0.1, 0.4, 0.4, 0.4, None], aesthetic=[9.0] * 5)
    second = img2dataset_shard(tmp_path, 1, 3, similarity=[0.4, None, 0.4], aesthetic=[9.0, 9.0, 9.0])
    scores = pa.table({"key": ["000000003", "000000001"], "AESTHETIC": [6.0, 4.0]})  # any order, not all
    parquet.write_table(scores, tmp_path / "00000.scores.parquet")
    rules = [*bound("similarity", 0.3, None), Rule("aesthetic > 5", "aesthetic > 5")]
    report = filter_shards([first, second], tmp_path / "kept.arrow", rules, nothing)
    assert kept_keys(tmp_path / "kept.arrow") == {"00000.tar": ["000000003"], "00001.tar": ["000010000"]}
    # Rule zero: the failed ones. The score of the sample without one is unknown, not the older column's.
    assert [(tally.removed, tally.unknown) for tally in report.tallies] == [(2, 0), (1, 1), (1, 1)]
    assert (report.rows, report.kept, report.from_members) == (8, 2, [])
    again = filter_shards(
        [str(tmp_path / "kept.arrow")], tmp_path / "again.arrow", bound("shorter-side-px", 600, 600), nothing
    )
    assert (again.rows, again.kept, again.absent) == (2, 2, 0)
    assert kept_keys(tmp_path / "again.arrow") == kept_keys(tmp_path / "kept.arrow")


def test_shards_packed_by_hand(tmp_path):
    """Without a table, the JSON and text of the samples are read; what is bad counts as not downloaded."""
    path = tmp_path / "00000.tar"
    members = {
        "a.json": b'{"similarity": "0.5", "caption": "from JSON", "tags": ["x"]}',
        "a.txt": b"other",
        "b.json": b'{"similarity": 0.1, "tags": null}',
        "b.txt": b"from text",
        "c.txt": b"from text as well",
        "d.json": b"{broken",
        "d.txt": b"from text",
        "e.txt": b"from \xff",
    }
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    report = filter_shards([str(path)], tmp_path / "kept.arrow", [Rule("t", "caption LIKE 'from%'")], nothing)
    assert kept_keys(tmp_path / "kept.arrow") == {"00000.tar": ["a", "b", "c"]}
    assert (report.from_members, report.tallies[0].removed) == ([str(path)], 2)
    report = filter_shards([str(path)], tmp_path / "kept.arrow", bound("similarity", 0.3, None), nothing)
    assert kept_keys(tmp_path / "kept.arrow") == {"00000.tar": ["a"]}
    assert (report.tallies[1].removed, report.tallies[1].unknown) == (1, 1)


def test_remote_shards(tmp_path):
    """Over http: metadata alone are read to select, tars to repack; what is not there is named."""
    img2dataset_shard(tmp_path / "there", 0, 4, similarity=[0.1, 0.4, 0.4, 0.0])
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *values):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "there")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/00000.tar"
        report = filter_shards([url], tmp_path / "kept.arrow", bound("similarity", 0.3, None), nothing)
        assert report.kept == 2
        assert "/00000.tar" not in asked
        (kept,) = listed([str(tmp_path / "kept.arrow")])
        assert (kept.url, kept.keys.to_pylist()) == (url, ["000000001", "000000002"])
        assert repack(tmp_path / "kept.arrow", tmp_path / "out", 10, lambda done: None).packed == 2
        with tarfile.open(tmp_path / "out/00000.tar") as tar:
            assert json.loads(tar.extractfile("000000001.json").read()) == {"key": "000000002"}
        with pytest.raises(DataError, match=r"00001\.tar does not exist"):
            filter_shards([url.replace("00000", "00001")], tmp_path / "x.arrow", [], nothing)
    finally:
        server.shutdown()
        server.server_close()


def test_the_command(tmp_path, capsys):
    shards = [img2dataset_shard(tmp_path, i, 4, similarity=[0.1, 0.4, 0.4, 0.0]) for i in range(3)]
    command.run([*shards, str(tmp_path / "out"), "--min-similarity", "0.3", "--where", "key > '000000001'"])
    said = capsys.readouterr().out
    assert "downloaded (status = success): removes 3; 9 left" in said
    assert "similarity >= 0.3: removes 3; 6 left" in said
    assert "key > '000000001': removes 1; 5 left" in said
    assert "5 samples are in 1 shard in" in said
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert tar.getnames() == [f"00000000{i}.json" for i in range(5)]
    with pytest.raises(ConfigError, match=r"allowed for shards: a name that ends in \.arrow, or a folder"):
        command.run([*shards, str(tmp_path / "out.parquet")])
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "00001.parquet")
    with pytest.raises(DataError, match="has no column key"):
        command.run([*shards, str(tmp_path / "kept.arrow")])


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.binary())], ids=str
)
def test_text_of_every_type_in_a_shards_table(tmp_path, kind):
    values = pa.array([b"first", b"second one"])
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = values.cast(pa.string()).cast(plain) if "string" in str(plain) else values.cast(plain)
    keys = pa.array([b"0", b"1"]).cast(pa.string()).cast(pa.binary())
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    parquet.write_table(pa.table({"key": keys, "caption": text.cast(kind)}), tmp_path / "0.parquet")
    table, packed = metadata_of(str(tmp_path / "0.tar"))
    assert packed
    assert table.to_pylist() == [{"key": "0", "caption": "first"}, {"key": "1", "caption": "second one"}]
    assert Judge([Rule("long", "LENGTH(caption) > 5")]).keeps(table, "t").tolist() == [False, True]
    parquet.write_table(pa.table({"key": pa.array([b"\xff"])}), tmp_path / "0.parquet")
    with pytest.raises(DataError, match=r"0\.parquet is not a parquet file that can be read: Invalid UTF8"):
        metadata_of(str(tmp_path / "0.tar"))


def test_scores_of_half_precision_are_compared_and_kept_as_they_are(tmp_path):
    scores = pa.array([0.25, None, float("nan"), 0.75], pa.float16())
    parquet.write_table(pa.table({"caption": list("abcd"), "score": scores}), tmp_path / "t.parquet")
    report = filter_table(
        str(tmp_path / "t.parquet"), tmp_path / "o.parquet", [Rule("s", "score > 0.5")], lambda *_: None
    )
    assert (report.kept, report.tallies[1].removed, report.tallies[1].unknown) == (1, 1, 2)
    assert parquet.read_table(tmp_path / "o.parquet").to_pylist() == [{"caption": "d", "score": 0.75}]
    assert parquet.read_schema(tmp_path / "o.parquet").field("score").type == pa.float16()


def test_a_column_that_the_rules_cannot_see_is_one_sentence(tmp_path):
    nested = pa.array([[0.5]], pa.list_(pa.float16()))
    parquet.write_table(pa.table({"caption": ["a"], "scores": nested}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="The rules cannot be applied to"):
        filter_table(
            str(tmp_path / "t.parquet"), tmp_path / "o.parquet", [Rule("c", "caption = 'a'")], lambda *_: None
        )
    assert [each.name for each in tmp_path.iterdir()] == ["t.parquet"]
