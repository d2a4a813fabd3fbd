"""An artifact behind an inference server: what each loads, and what it is configured with."""
