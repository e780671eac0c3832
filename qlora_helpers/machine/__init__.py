"""This computer: setup report, CUDA libraries, workspace, telemetry, hardware catalogue, prices, SageMaker Studio from inside."""
