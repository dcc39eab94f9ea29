"""Which rows of a metadata table meet which rules, by duckdb, over Arrow tables in memory.

The expressions may be untrusted (a recipe from the web), so two things stand between them and the machine: each has
to parse as the condition of one WHERE without a query inside, and the connection has no access to files, network,
extensions or Python's variables, which nothing can switch on again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2i.errors import ConfigError, DataError

from ..optional import need
from .presets import ALIASES, Rule

STATUS = Rule("downloaded (status = success)", "status = 'success'")
KEPT = -1
MEMORY = "2GiB"
REFUSED = {"SUBQUERY": "a query", "WINDOW": "a window function", "STAR": "*", "PARAMETER": "a parameter"}


@dataclass
class Tally:
    """Of one rule, counted on what the rules before it left. removed: rows that do not meet it; unknown: rows that
    are removed as they have no value (NULL, NaN) where it needs one"""

    name: str
    removed: int = 0
    unknown: int = 0


class Judge:
    """Applies rules in their order, after rule zero: where there is a column `status`, it has to be "success".

    Raises ConfigError at once for an expression that is not one condition.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = [STATUS, *rules]
        self.tallies = [Tally(rule.name) for rule in self.rules]
        self._duckdb = need("duckdb", "data")
        self._connection = self._duckdb.connect(
            config={"memory_limit": MEMORY, "python_enable_replacements": "false"}
        )
        self._connection.execute("SET enable_external_access=false; SET lock_configuration=true")
        self._references = [self._columns_of(rule) for rule in self.rules]
        self._queries: dict[Any, str] = {}

    def keeps(self, table: Any, name: str) -> np.ndarray:
        """(n,) bool: which rows of the Arrow table meet all rules; the others are tallied.
        name: where the table comes from. Raises DataError where it lacks a column, or a value does not suit a rule."""
        connection = self._connection
        table = _without_halves(table)
        try:
            connection.register("given", table)
            if table.schema not in self._queries:
                self._queries[table.schema] = self._query(table.schema, name)
            verdicts = connection.execute(self._queries[table.schema]).fetchnumpy()["verdict"]
        except self._duckdb.Error as error:
            raise DataError(f"The rules cannot be applied to {name}: {_line(error)}") from error
        finally:
            connection.unregister("given")
        counts = np.bincount(verdicts[verdicts != KEPT], minlength=2 * len(self.rules))
        for number, tally in enumerate(self.tallies):
            tally.removed += int(counts[2 * number])
            tally.unknown += int(counts[2 * number + 1])
        return verdicts == KEPT

    def _columns_of(self, rule: Rule) -> list[str]:
        """The columns that the rule's expression names. Raises ConfigError where it is not one condition."""

        def parsed(condition: str) -> Any:
            # No parentheses around it, so that it cannot close them; a line of its own, so that it ends its comments.
            query = f"SELECT * FROM t WHERE {condition}\n"
            return json.loads(
                self._connection.execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0][0]
            )

        found, plain = parsed(rule.expression), parsed("TRUE")
        if found["error"]:
            why = found["error_message"] if "WHERE" not in found["error_message"] else "it cannot be parsed"
            raise ConfigError(f"{rule.name!r} is not a condition: {why}.")
        condition = found["statements"][0]["node"].pop("where_clause", None)
        plain["statements"][0]["node"].pop("where_clause")
        if condition is None or found != plain:
            raise ConfigError(f"{rule.name!r} is not a condition; allowed: what may stand after WHERE alone.")
        nodes = list(_nodes(condition))
        for node in nodes:
            if node.get("class") in REFUSED:
                raise ConfigError(
                    f"{rule.name!r} holds {REFUSED[node['class']]}; allowed: conditions on columns."
                )
        return [node["column_names"][0] for node in nodes if node.get("class") == "COLUMN_REF"]

    def _query(self, schema: Any, name: str) -> str:
        """One row "verdict" for each row, in order: KEPT, or twice the number of the first rule that it does not meet,
        plus 1 where that is unknown."""
        columns = _columns(schema)
        there = {column.lower() for column in columns}
        rules = self.rules if "status" in there else [Rule(STATUS.name, "TRUE"), *self.rules[1:]]
        source = ", ".join(f"{expression} AS {_quoted(column)}" for column, expression in columns.items())
        for rule, references in zip(rules[1:], self._references[1:], strict=True):
            try:
                kind = self._connection.execute(
                    f"DESCRIBE SELECT * FROM (SELECT ({rule.expression}\n) AS met FROM (SELECT {source} FROM given))"
                ).fetchall()[0][1]
                self._connection.execute(
                    f"EXPLAIN SELECT 1 FROM (SELECT {source} FROM given) WHERE ({rule.expression}\n)"
                ).fetchall()  # refuses aggregates
            except self._duckdb.Error as error:
                absent = [column for column in references if column.lower() not in there]
                missing = [column for column in absent if f'"{column}"' in str(error)]
                if missing:
                    raise DataError(
                        f"The rule {rule.name!r} needs the column {missing[0]}, which {name} does not have; it has "
                        f"{', '.join(schema.names)}."
                    ) from error
                raise ConfigError(f"{rule.name!r} is not a condition: {_line(error)}") from error
            if kind != "BOOLEAN":
                raise ConfigError(f"{rule.name!r} is {kind}; allowed: a condition, which is true or false.")
        cases = " ".join(
            f"WHEN ({rule.expression}\n) IS NULL THEN {2 * number + 1} WHEN NOT ({rule.expression}\n) THEN {2 * number}"
            for number, rule in enumerate(rules)
        )
        return f"SELECT (CASE {cases} ELSE {KEPT} END)::INTEGER AS verdict FROM (SELECT {source} FROM given)"


def _without_halves(table: Any) -> Any:
    """duckdb knows no half precision, in which scores may be."""
    pa = need("pyarrow", "data")
    for at, field in enumerate(table.schema):
        if pa.types.is_float16(field.type):
            table = table.set_column(at, field.name, table[at].cast(pa.float32()))
    return table


def _columns(schema: Any) -> dict[str, str]:
    """Name -> SQL expression, aliases included. NaN becomes NULL: to duckdb it is larger than every number."""
    pa = need("pyarrow", "data")
    found: dict[str, str] = {}
    for field in schema:
        name = _quoted(field.name)
        is_float = pa.types.is_floating(field.type)
        found[field.name] = f"CASE WHEN NOT isnan({name}) THEN {name} END" if is_float else name
    lower = {name.lower(): name for name in reversed(found)}
    for group in ALIASES:
        known = next((lower[alias] for alias in group if alias in lower), None)
        if known is not None:
            found |= {alias: found[known] for alias in group if alias not in lower}
    return found


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".!") + "."
