"""A report in a few lines, for who does not want to read JSON."""

from typing import Any

from megatron_dmc.evaluation.exported.evaluate import recall_over_base


def told(report: dict[str, Any]) -> str:
    """A line each for loss, copying, loss after a context, recall, and the cache at every length; against the base where there
    is one."""
    lines = []
    if "loss" in report:
        kl = f", KL(base || model) {report['kl']:.4f}" if "kl" in report else ""
        lines.append(f"loss {report['loss']:.3f} nats per token{kl}")
        lines.append(
            "copying " + ", ".join(f"{each['loss']:.3f} in {each['tokens']} tokens" for each in report["copying"])
        )
    lines.append("after a context " + ", ".join(map(_continued, report["continued"])))
    counted = [row for row in report["recall"] if row["counts"]]
    recall = f"{_right(counted)} right answers in the tasks that the base can do"
    if "base" not in report:
        recall = f"{_right(counted)} right answers, tasks that it cannot do left out"
    elif (over := recall_over_base(report)) is not None:
        recall += f", {over:.0%} of the base's accuracy"
    held = f", kept slots in {report['cache_dtype']}" if "cache_dtype" in report else ""
    served = f"recall, cache and speed in {report['serving_dtype']}{held}"
    return "\n".join([*lines, f"recall {recall}", *map(_serving, report["serving"]), served])


def _continued(row: dict[str, Any]) -> str:
    kl = f" (KL {row['kl']:.4f})" if "kl" in row else ""
    return f"{row['loss']:.3f}{kl} in {row['tokens']} tokens"


def _right(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['correct'] for row in rows)} of {sum(row['samples'] for row in rows)}"


def _serving(row: dict[str, Any]) -> str:
    ratio = f", CR {row['compression_ratio']:.2f}" if "compression_ratio" in row else ""
    plain = {name: row.get(f"plain_{name}") for name in ("cache_bytes", "seconds_to_first_token", "tokens_per_second")}
    beside = {name: "" if value is None else f" (base {value:.1f})" for name, value in plain.items()}
    if plain["cache_bytes"] is not None:
        beside["cache_bytes"] = f" (base {plain['cache_bytes'] / 1e6:.1f} MB)"
    return (
        f"{row['tokens']} tokens: cache {row['cache_bytes'] / 1e6:.1f} MB{beside['cache_bytes']}{ratio}, first token after "
        f"{row['seconds_to_first_token']:.1f} s{beside['seconds_to_first_token']}, then {row['tokens_per_second']:.1f} "
        f"tokens/s{beside['tokens_per_second']}"
    )
