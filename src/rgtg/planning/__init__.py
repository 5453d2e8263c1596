"""What a job will take: memory, time and device-hours of every method, by arithmetic and small measured runs."""
