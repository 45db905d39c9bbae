def summary(j):
    return str(j.windows[-1])
