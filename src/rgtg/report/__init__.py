"""Reports: one self-contained HTML page, and the same in Markdown, from results, audits and verdicts."""

from rgtg.report.build import html_report as html_report
from rgtg.report.build import write_report as write_report
