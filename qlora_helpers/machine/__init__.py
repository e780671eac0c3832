"""This computer: environment report, CUDA libraries, workspace, telemetry, hardware catalogue, prices, Studio from inside."""
