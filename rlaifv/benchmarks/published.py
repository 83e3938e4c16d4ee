"""All kinds of benchmarks, and the headline rates that a report shows of them."""

from collections.abc import Mapping

from rlaifv.benchmarks import amber, chair, mmhal, object_halbench, pope, refomb

SPECS = {module.SPEC.kind: module.SPEC for module in (chair, object_halbench, amber, mmhal, refomb, pope)}
HEADLINES = {kind: spec.headlines for kind, spec in SPECS.items()}


def rates_table(results: Mapping[str, Mapping]) -> list[dict]:
    """The headline rates of `suite.score`, ready for a data frame: each with its 95 % interval, in percent unless a
    mean."""
    rows = []
    for name, result in results.items():
        for rate in HEADLINES[result["kind"]]:
            if rate in result["intervals"]:
                scale = 1 if rate in result["means"] else 100
                low, high = (scale * bound for bound in result["intervals"][rate])
                value = scale * result["metrics"][rate]
                unit = "" if scale == 1 else "%"
                rows.append({"benchmark": name, "rate": rate, "value": value, "low": low, "high": high, "unit": unit})
    return rows
