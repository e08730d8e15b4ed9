"""Lightning callbacks: pictures, metrics and speed while a method trains."""
