"""The shipped runs, a folder each, and which runs the study is made of (`runs`)."""
