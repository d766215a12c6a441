"""States of flow runs that are ours: flows end in them, automations wait for them."""

REGRESSION = "Regression"
"""Of type Completed: a sweep that ran to its end, and in which a score fell beyond noise since the last execution."""
