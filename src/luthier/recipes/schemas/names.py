"""What a recipe may name itself under `recipe`, apart from the schemas, which bring torch."""

from __future__ import annotations

from typing import Final

AI_FEEDBACK: Final = "ai_feedback"
REINFORCE: Final = "reinforce"
ADAPTATION: Final = "domain_adaptation"
FINETUNE: Final = "finetune"
SEVERAL: Final = "several"
MERGE: Final = "merge"
MERGEKIT: Final = "merge_method"
"""The key by which a recipe of mergekit is known."""
