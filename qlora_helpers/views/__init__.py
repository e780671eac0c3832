"""What a person sees of a run: report, charts, monitor, TensorBoard, following a run, and the widgets."""
