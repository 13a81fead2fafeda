"""The columns of the tables of docs/benchmarks/conversion.md."""

from columns import Columns

COPY: Columns = (
    ("wall s", "{wall_s:.2f}"),
    ("CPU s", "{cpu_s:.2f}"),
    ("peak MiB", "{rss_mib:.0f}"),
    ("MB/s", "{mb_per_s:.0f}"),
    ("wall / cp", "{wall_to_cp:.2f}"),
    ("wall / cp on the disk", "{wall_to_durable_cp:.2f}"),
)
CONVERSION: Columns = (("input", "{input}"), ("contender", "{contender}"), *COPY)
COLUMNS: dict[str, Columns] = {
    "conversion": CONVERSION,
    "conversion-without-rest": CONVERSION,
    "conversion-sizes": (("GB", "{gigabytes:g}"), ("contender", "{contender}"), *COPY),
    "conversion-new-codes": (*CONVERSION[:5], ("times as fast as 1 worker", "{times_peer:.1f}")),
    "conversion-peer": (*CONVERSION[:5], ("times as fast as 1 worker", "{times_peer:.1f}")),
    "conversion-gpu": (*CONVERSION[:3], CONVERSION[5]),
    "conversion-gpu-new-codes": CONVERSION[:3],
    "conversion-new-codes-16-cores": CONVERSION[:3],
    "startup": (
        ("command", "`{command}`"),
        ("wall s", "{wall_s:.2f}"),
        ("CPU s", "{cpu_s:.2f}"),
        ("peak MiB", "{rss_mib:.0f}"),
    ),
    "requantize-gpu": (
        ("N × K", "{n} × {k}"),
        ("scales", "{scales}"),
        ("our kernels ms", "{ms:.1f}"),
        ("torch's operations ms", "{reference_ms:.1f}"),
        ("times as fast", "{times:.1f}"),
        ("the same, codes kept ms", "{codes_kept_ms:.1f}"),
        ("copies of the codes ms", "{copies_ms:.1f}"),
    ),
}
