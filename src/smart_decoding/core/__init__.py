"""The decision core: trees, costs, calibration and policies. numpy and scipy only."""
