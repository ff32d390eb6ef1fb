"""What `bench` prints of a report: tables in Markdown."""

from __future__ import annotations

from typing import Any

from cuflash.cli.contenders import COMPILED, DENSE, DOCUMENTS, OURS, OWN
from cuflash.cli.suites import HOST_SUITE

MISSING = "–"


def table(report: dict[str, Any]) -> str:
    """The table of the report's suite, and below it why results are missing."""
    rows = report["cells"]
    peers = list(dict.fromkeys(n for row in rows for n in row["results"] if n not in OWN))
    has_shares, of_host = any("share" in row for row in rows), report["suite"] == HOST_SUITE
    if of_host:
        lines = _host_times(rows, peers)
    elif has_shares:
        lines = _shares(rows, peers)
    else:
        lines = _rates(rows, peers, report["gemm"]["tflops"])
    failures = {
        f"{name}: {result['error']}"
        for row in rows
        for name, result in row["results"].items()
        if "error" in result
    }
    gemm = report["gemm"]
    figures = (
        f"milliseconds and, of {OURS}, TFLOP/s and time / (visible tiles x dense time)"
        if has_shares
        else "microseconds of a call"
        if of_host
        else "TFLOP/s"
    )
    title = (
        f"{report['device']}, {report['date']}, {figures}; "
        f"matrix product: {gemm['tflops']:.4g} ({gemm['by']})"
    )
    return "\n".join([title, "", *lines, *(["", *sorted(failures)] if failures else [])])


def rates(results: dict[str, Any]) -> str:
    """One cell's, in one line."""
    rates = {name: result.get("tflops") for name, result in results.items()}
    return ", ".join(f"{name} {f'{x} TFLOP/s' if x else 'absent'}" for name, x in rates.items())


def _rates(rows: list[dict[str, Any]], peers: list[str], gemm_tflops: float) -> list[str]:
    """The rate of each, and ours as a share of the matrix product and of the best."""
    sizes, others = {"D": "head_dim", "S": "seqlen"}, peers
    if any(row.get("rule") for row in rows):  # of packed sequences
        sizes = {"sequences": "rule", "tokens": "seqlen", "H": "heads"}
        others = [DOCUMENTS, *peers]
    lines = header(["", *sizes, "causal", OURS, "of GEMM", *others, "to best peer"])
    for row in rows:
        rates = {name: result.get("tflops") for name, result in row["results"].items()}
        ours = rates[OURS]
        best = max((rates[p] for p in peers if rates.get(p)), default=None)
        lines.append(
            line(
                row["direction"],
                *(row[size] for size in sizes.values()),
                "yes" if row["causal"] else "no",
                number(ours),
                f"{100 * ours / gemm_tflops:.0f} %" if ours else MISSING,
                *(number(rates.get(name)) for name in others),
                f"{ours / best:.2f}" if ours and best else MISSING,
            )
        )
    return lines


def _shares(rows: list[dict[str, Any]], peers: list[str]) -> list[str]:
    """Milliseconds of each, ours beside the visible share of the dense time, and to the best."""
    heads = ["", "mask", "S", "H", "causal", "visible tiles", DENSE]
    for name in (OURS, COMPILED):
        heads += [name, "TFLOP/s", "over share"]
    lines = header([*heads, *peers, "to best peer"])
    for row in rows:
        results = row["results"]
        times = {name: result.get("median_ms") for name, result in results.items()}
        ours, best = times[OURS], min((times[p] for p in peers if times.get(p)), default=None)
        own = (
            number(results[name].get(figure))
            for name in (OURS, COMPILED)
            for figure in ("median_ms", "tflops", "over_share")
        )
        lines.append(
            line(
                row["direction"],
                row["rule"] or f"{row['bias']} bias",
                row["seqlen"],
                row["heads"],
                "yes" if row["causal"] else "no",
                f"{100 * row['share']:.3g} %",
                number(times[DENSE]),
                *own,
                *(number(times.get(peer)) for peer in peers),
                f"{best / ours:.2f}" if ours and best else MISSING,
            )
        )
    return lines


def _host_times(rows: list[dict[str, Any]], peers: list[str]) -> list[str]:
    """Microseconds of each call, and ours to the best."""
    lines = header(["", "D", OURS, *peers, "to best peer"])
    for row in rows:
        results = row["results"].items()
        times = {name: 1e3 * x["median_ms"] for name, x in results if "median_ms" in x}
        ours, best = times.get(OURS), min((times[p] for p in peers if p in times), default=None)
        lines.append(
            line(
                row["direction"],
                row["head_dim"],
                *(number(times.get(name)) for name in (OURS, *peers)),
                f"{best / ours:.2f}" if ours and best else MISSING,
            )
        )
    return lines


def header(heads: list[str]) -> list[str]:
    """A table's first two lines."""
    return [line(*heads), "|" + " --- |" * len(heads)]


def line(*columns: Any) -> str:
    """One line of a table."""
    return "| " + " | ".join(map(str, columns)) + " |"


def number(value: float | None) -> str:
    """Four digits, or what stands for none."""
    return MISSING if value is None else f"{value:.4g}"
