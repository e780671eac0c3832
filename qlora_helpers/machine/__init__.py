"""This computer: its environment report, CUDA libraries, workspace, telemetry, hardware catalogue, prices, and Studio from inside."""
