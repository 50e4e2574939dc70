"""The commands for CSV files: options, the file beside a CSV file, progress."""
