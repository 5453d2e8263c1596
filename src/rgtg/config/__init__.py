"""Settings of every command as pydantic models. Nothing here imports torch."""

from rgtg.config.base import Settings as Settings
from rgtg.config.base import SettingsT as SettingsT
from rgtg.config.base import read_yaml as read_yaml
from rgtg.config.base import validate as validate
from rgtg.config.commands import CalibrateSettings as CalibrateSettings
from rgtg.config.commands import DataCheckSettings as DataCheckSettings
from rgtg.config.commands import DemoSettings as DemoSettings
from rgtg.config.commands import DoctorSettings as DoctorSettings
from rgtg.config.commands import FetchSettings as FetchSettings
from rgtg.config.commands import JudgeSettings as JudgeSettings
from rgtg.config.commands import PlanSettings as PlanSettings
from rgtg.config.commands import PushSettings as PushSettings
from rgtg.config.commands import TheorySettings as TheorySettings
from rgtg.config.decoding import DecodingSettings as DecodingSettings
from rgtg.config.decoding import GenerateSettings as GenerateSettings
from rgtg.config.decoding import ModelSettings as ModelSettings
from rgtg.config.decoding import ScoreSettings as ScoreSettings
from rgtg.config.evaluation import AuditSettings as AuditSettings
from rgtg.config.evaluation import CompareRun as CompareRun
from rgtg.config.evaluation import CompareSettings as CompareSettings
from rgtg.config.evaluation import EvaluationSettings as EvaluationSettings
from rgtg.config.evaluation import GuidingScorer as GuidingScorer
from rgtg.config.evaluation import SweepSettings as SweepSettings
from rgtg.config.serving import EngineSettings as EngineSettings
from rgtg.config.training import LoraSettings as LoraSettings
from rgtg.config.training import TrainSettings as TrainSettings
