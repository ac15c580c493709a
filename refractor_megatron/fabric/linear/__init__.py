"""Linear mode (spec section 4): attention through running states, one for each mask bucket, so that masks survive.

phi(Q)(phi(K)^T V) sums over all earlier keys, and what a query may not read has to be left out of that sum. Tokens of
equal document, segment and type class (a *bucket*) are read by the same queries, so a state for each bucket is enough:
a query adds up the states of the buckets it may read, and a token of any other bucket cannot reach it.
"""

from refractor_megatron.fabric.linear.attention import linear_attention, quadratic_linear_attention
from refractor_megatron.fabric.linear.decode import LinearState
from refractor_megatron.fabric.linear.features import FeatureMap, LinearMode
from refractor_megatron.fabric.linear.plan import LinearPlan, linear_plan_for

__all__ = [
    "FeatureMap",
    "LinearMode",
    "LinearPlan",
    "LinearState",
    "linear_attention",
    "linear_plan_for",
    "quadratic_linear_attention",
]
