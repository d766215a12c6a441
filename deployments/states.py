"""States of flow runs that are ours: flows end in them, automations wait for them."""

REGRESSION = "Regression"
"""Of type Completed: a sweep that ran to its end with a score that is worse beyond noise than in the last execution."""
