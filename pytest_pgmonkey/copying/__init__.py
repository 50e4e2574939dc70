"""CSV files in and out of tables, by COPY of raw blocks."""
