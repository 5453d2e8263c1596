"""Results, audits and verdicts → one self-contained HTML page, and the same in Markdown; loads no model."""

from rgtg.report.build import html_report as html_report
from rgtg.report.build import write_report as write_report
