"""The decision core: trees, costs, calibration and policies. numpy only."""
