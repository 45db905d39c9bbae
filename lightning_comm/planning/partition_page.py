def partition_page(j):
    return str(j)
