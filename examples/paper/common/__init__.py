"""What every room needs: data, networks, files, intervals, the command line."""
