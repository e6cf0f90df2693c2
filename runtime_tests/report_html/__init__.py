"""The parity report as one HTML page: `details` gathers what it shows, `page` renders it, `causes` explains."""
