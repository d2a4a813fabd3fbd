"""An artifact behind an inference server: what each server loads and how it is configured."""
