"""Exporters: one package per format, all driven by `exporters.export.export`."""
