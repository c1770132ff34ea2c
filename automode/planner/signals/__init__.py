"""Streaming signals: scalars in, readings out when a state changes. Pure Python and numpy, serialisable, no clock."""

from automode.planner.signals.gap import GapState, GeneralizationGap
from automode.planner.signals.joint_z import JointZ
from automode.planner.signals.level_shift import LevelShift
from automode.planner.signals.mann_kendall import MannKendall
from automode.planner.signals.nonfinite import NonFinite, NonFiniteState, SteppingState
from automode.planner.signals.page_hinkley import PageHinkley
from automode.planner.signals.readings import Reading
from automode.planner.signals.robust_z import RobustZ
from automode.planner.signals.slices import SliceMeasure, SliceStatus, SliceWatch
from automode.planner.signals.spike_burst import SpikeBurst
from automode.planner.signals.suite import SignalSuite
from automode.planner.signals.trend import BlockTrend, TrendState
from automode.planner.signals.wire import SignalState

__all__ = [
    "BlockTrend",
    "GapState",
    "GeneralizationGap",
    "JointZ",
    "LevelShift",
    "MannKendall",
    "NonFinite",
    "NonFiniteState",
    "PageHinkley",
    "Reading",
    "RobustZ",
    "SignalState",
    "SignalSuite",
    "SliceMeasure",
    "SliceStatus",
    "SliceWatch",
    "SpikeBurst",
    "SteppingState",
    "TrendState",
]
