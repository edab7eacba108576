"""AdaMerging: merging coefficients learned from unlabelled inputs, on any module."""

from suture.adaptation.adamerging import OPTIMIZERS, AdaMergingResult, adapt
from suture.adaptation.coefficients import Coefficients, Layout, layout, load_coefficients, save_coefficients
from suture.adaptation.essential_subspaces import esm
from suture.adaptation.feature_norm import FeatureNorm, feature_norms, norm_drift
from suture.adaptation.fisher_merging import fisher
from suture.adaptation.learned_heads import SyMergeResult, symerge
from suture.adaptation.loaded import InputMerge
from suture.adaptation.objectives import (
    OBJECTIVES,
    Objective,
    entropy,
    entropy_epsilon,
    entropy_loss,
    expert_cross_entropy,
    expert_feature_l1,
    expert_kl,
)
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.regression_mean import regmean, regmean_pp

__all__ = [
    "OBJECTIVES",
    "OPTIMIZERS",
    "AdaMergingOptions",
    "AdaMergingResult",
    "Coefficients",
    "FeatureNorm",
    "InputMerge",
    "Layout",
    "Objective",
    "SyMergeResult",
    "adapt",
    "entropy",
    "entropy_epsilon",
    "entropy_loss",
    "esm",
    "expert_cross_entropy",
    "expert_feature_l1",
    "expert_kl",
    "feature_norms",
    "fisher",
    "layout",
    "load_coefficients",
    "norm_drift",
    "regmean",
    "regmean_pp",
    "save_coefficients",
    "symerge",
]
