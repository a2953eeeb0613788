"""What people look at: figures, tables for the terminal, contact sheets, and the report of a run as one HTML file."""

from timestep_experts.report.clips import save_clip_sheet
from timestep_experts.report.figures import gate_heat_map, loss_per_timestep, training_curves
from timestep_experts.report.html import ReportContent, write_report
from timestep_experts.report.pictures import save_sheet
from timestep_experts.report.table import interval_table, results_rows, results_table

__all__ = [
    "ReportContent",
    "gate_heat_map",
    "interval_table",
    "loss_per_timestep",
    "results_rows",
    "results_table",
    "save_clip_sheet",
    "save_sheet",
    "training_curves",
    "write_report",
]
