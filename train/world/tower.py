"""The vision tower alone, trained on what its tokens show: which thing, of which colour, and where its box ends.

In a joint run the decoder takes most of a step; alone the tower sees several times the pictures in the same time, and
the decoder, which comes after, finds names and colours to point at.
"""

from __future__ import annotations

from typing import Any

from train.trainer import GroundingTrainer
from train.world.dense_head import dense_targets


class TowerTrainer(GroundingTrainer):
    """GroundingTrainer with the dense head's tower loss alone; the decoder does not run."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The tower's loss on the batch's pictures."""
        grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
        merge = model.model.visual.spatial_merge_size
        targets = dense_targets(grids, merge, [seen for sample in inputs["samples"] for seen in sample.seen])
        tokens = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        loss = model.dense_head.tower_loss(tokens.float(), targets)
        self._metrics["train"]["tower_loss"].append(loss.item())
        return (loss, {}) if return_outputs else loss
