"""Parts of a sweep: what is searched, which trial comes next, where it runs, what is kept, what came out."""
