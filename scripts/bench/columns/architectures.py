"""The columns of the tables of docs/reference/architectures.md."""

from columns import Columns

COLUMNS: dict[str, Columns] = {
    "architectures": (
        ("architecture", "`{architecture}`"),
        ("INT4 layers", "{layers:.0f}"),
        ("`lut`, `search`", "{lut_search}"),
        ("`lut`, `direct`", "{lut_direct}"),
        ("`compressed-tensors`", "{compressed_tensors_search}"),
        ("why", "{why}"),
    ),
}
