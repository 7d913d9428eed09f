def allocate(values, costs, budget):
    return {}
